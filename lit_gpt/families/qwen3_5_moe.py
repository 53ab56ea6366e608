"""The language models of Qwen 3.5 with experts (Qwen Team 2026): Qwen 3.5's layers, and Qwen3-Next's experts."""

from typing import Any

from lit_gpt.families import llama, qwen3_5, qwen3_next
from lit_gpt.families.tables import Layout, Said
from lit_gpt.model.config import Config

MODEL_TYPES = ("qwen3_5_moe_text",)
WRAPPERS = ("qwen3_5_moe",)  # all that are published, which read images and videos
# What transformers takes for fields that a config.json leaves out.
DEFAULTS = {
    "qwen3_5_moe_text": dict(
        max_position_embeddings=32768, num_key_value_heads=2, num_experts=256, num_experts_per_tok=8
    )
}

PRESETS = {
    "Qwen3.5-35B-A3B": llama.preset(
        40, 16, 2, 2048, 512, 248320, model_type="qwen3_5_moe_text", head_dim=256, max_position_embeddings=262144,
        rope_theta=1e7, partial_rotary_factor=0.25, num_experts=256, num_experts_per_tok=8, moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
    ),
}  # fmt: skip


config, weights = qwen3_next.config, qwen3_5.weights


ARCHITECTURES = ("qwen35moe",)


def gguf(config: Config) -> Layout:
    return qwen3_5.apart_gguf("qwen35moe", config)


def from_gguf(said: Said) -> dict[str, Any]:
    own = {"architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text"}
    return own | qwen3_next.hybrid_from_gguf(said) | qwen3_next.experts_from_gguf(said)


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import Qwen3_5MoeTextConfig

    # keys of 8 values have lengths near zero, by which they are divided: float32 would lose digits in any code
    own = qwen3_next.TINY_EXPERTS | {"linear_key_head_dim": 16} | fields
    size = qwen3_next.tiny_size_of_hybrid(**own)
    return {"qwen3_5_moe": Qwen3_5MoeTextConfig(**size)}
