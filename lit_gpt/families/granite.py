"""Granite 3 (Granite Team 2024): Llama with factors on embeddings, scores, residuals and logits."""

from typing import Any

from lit_gpt.families import llama
from lit_gpt.families.fields import tiny_size
from lit_gpt.families.tables import Layout, Said
from lit_gpt.model.config import Config

MODEL_TYPES = ("granite",)

_OWN: dict[str, Any] = dict(
    model_type="granite", rms_norm_eps=1e-5, tie_word_embeddings=True, embedding_multiplier=12.0,
    residual_multiplier=0.22,
)  # fmt: skip
_2B: dict[str, Any] = dict(_OWN, attention_multiplier=0.015625, logits_scaling=8.0)
_8B: dict[str, Any] = dict(_OWN, attention_multiplier=0.0078125, logits_scaling=16.0)
_3_0: dict[str, Any] = dict(vocab=49155, max_position_embeddings=4096)
_3_1: dict[str, Any] = dict(vocab=49155, max_position_embeddings=131072, rope_theta=5e6)
_3_3: dict[str, Any] = dict(vocab=49159, max_position_embeddings=131072, rope_theta=1e7)
PRESETS = {
    "granite-3.0-2b-instruct": llama.preset(40, 32, 8, 2048, 8192, **_2B, **_3_0),
    "granite-3.0-8b-instruct": llama.preset(40, 32, 8, 4096, 12800, **_8B, **_3_0),
    "granite-3.1-2b-instruct": llama.preset(40, 32, 8, 2048, 8192, **_2B, **_3_1),
    "granite-3.1-8b-instruct": llama.preset(40, 32, 8, 4096, 12800, **_8B, **_3_1),
    "granite-3.3-2b-instruct": llama.preset(40, 32, 8, 2048, 8192, **_2B, **_3_3),
    "granite-3.3-8b-instruct": llama.preset(40, 32, 8, 4096, 12800, **_8B, **_3_3),
}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    return llama.config(hf) | {
        "embedding_scale": hf.get("embedding_multiplier", 1.0),
        "attention_scale": hf.get("attention_multiplier", 1.0),
        "residual_scale": hf.get("residual_multiplier", 1.0),
        "logit_divisor": hf.get("logits_scaling", 1.0),
    }


weights = llama.weights


ARCHITECTURES = ("granite",)


def gguf(config: Config) -> Layout:
    scales = {
        "attention.scale": config.attention_scale,
        "embedding_scale": config.embedding_scale,
        "residual_scale": config.residual_scale,
        "logit_scale": config.logit_divisor,
    }
    return Layout("granite", interleaved=True, metadata=scales)


def from_gguf(said: Said) -> dict[str, Any]:
    return {"architectures": ["GraniteForCausalLM"], "model_type": "granite", **multipliers(said)}


def multipliers(said: Said) -> dict[str, float]:
    """Return the factors of the family, in config.json's words."""
    return {
        "attention_multiplier": said.need("attention.scale", float),
        "embedding_multiplier": said.need("embedding_scale", float),
        "residual_multiplier": said.need("residual_scale", float),
        "logits_scaling": said.need("logit_scale", float),
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import GraniteConfig

    size = tiny_size(**dict(num_key_value_heads=2) | fields)
    factors: dict[str, Any] = dict(
        embedding_multiplier=3.0, attention_multiplier=0.125, residual_multiplier=0.4, logits_scaling=2.0
    )
    return {"granite": GraniteConfig(**size, **factors, tie_word_embeddings=True)}
