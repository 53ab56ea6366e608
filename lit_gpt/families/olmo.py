"""OLMo (Groeneveld et al. 2024): Llama with norms that have no weights; some clamp queries, keys and values."""

from functools import partial
from typing import Any

from lit_gpt.families import llama
from lit_gpt.families.fields import tiny_size
from lit_gpt.families.tables import Layout, Said
from lit_gpt.model.config import Config

MODEL_TYPES = ("olmo",)

_preset = partial(llama.preset, model_type="olmo", vocab=50304)
PRESETS = {
    "OLMo-1B-hf": _preset(16, 16, 16, 2048, 8192, tie_word_embeddings=True),
    "OLMo-7B-hf": _preset(32, 32, 32, 4096, 11008),
}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    own = {"norm_class": "PlainLayerNorm", "norm_eps": 1e-5, "bias": False, "clip_qkv": hf.get("clip_qkv")}
    return llama.config(hf) | own


weights = llama.weights


ARCHITECTURES = ("olmo",)


def gguf(config: Config) -> Layout:
    return Layout("olmo", interleaved=True, metadata={"attention.clamp_kqv": config.clip_qkv})


def from_gguf(said: Said) -> dict[str, Any]:
    clip = said.get("attention.clamp_kqv", float) or None
    return {"architectures": ["OlmoForCausalLM"], "model_type": "olmo", "clip_qkv": clip}


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import OlmoConfig

    size = tiny_size(**dict(num_key_value_heads=2, pad_token_id=None, eos_token_id=2) | fields)
    return {"olmo": OlmoConfig(**size), "clipped": OlmoConfig(**size, clip_qkv=0.5, tie_word_embeddings=True)}
