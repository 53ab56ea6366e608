"""Granite 3 with experts (Granite Team 2024): Granite's factors, and 32 or 40 experts of which each token goes to
eight."""

from dataclasses import replace
from typing import Any

from lit_gpt.families import granite, llama
from lit_gpt.families.fields import tiny_size
from lit_gpt.families.tables import Layout, Said, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("granitemoe",)

_1B: dict[str, Any] = llama.preset(
    24, 16, 8, 1024, 512, 49155, model_type="granitemoe", max_position_embeddings=4096, num_local_experts=32,
    num_experts_per_tok=8, embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.015625,
    logits_scaling=6.0, tie_word_embeddings=True,
)  # fmt: skip
PRESETS = {"granite-3.0-1b-a400m-base": _1B, "granite-3.0-1b-a400m-instruct": _1B}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    return granite.config(hf) | experts(hf)


def experts(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the Config for the MLPs."""
    return {
        "mlp_class": "MoE",
        "intermediate_size": hf["intermediate_size"],
        "n_expert": hf.get("num_local_experts", 8),
        "n_expert_per_token": hf.get("num_experts_per_tok", 2),
    }


def weights(config: Config) -> Table:
    mlp = "model.layers.{}.block_sparse_moe."
    return {
        **llama.weights(config),
        "h.{}.mlp.router": mlp + "router.layer",
        "h.{}.mlp.gate_up": mlp + "input_linear",
        "h.{}.mlp.proj": mlp + "output_linear",
    }


ARCHITECTURES = ("granitemoe",)


def gguf(config: Config) -> Layout:
    return replace(granite.gguf(config), architecture="granitemoe")


def from_gguf(said: Said) -> dict[str, Any]:
    return {
        "architectures": ["GraniteMoeForCausalLM"],
        "model_type": "granitemoe",
        "num_local_experts": said.need("expert_count", int),
        "num_experts_per_tok": said.need("expert_used_count", int),
        **granite.multipliers(said),
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import GraniteMoeConfig

    own: dict[str, Any] = dict(
        intermediate_size=24, num_key_value_heads=2, num_local_experts=5, num_experts_per_tok=2,
        embedding_multiplier=3.0, attention_multiplier=0.125, residual_multiplier=0.4, logits_scaling=2.0,
        tie_word_embeddings=True,
    )  # fmt: skip
    return {"granitemoe": GraniteMoeConfig(**tiny_size(**own | fields))}
