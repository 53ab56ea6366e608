"""The language models of Qwen 3.5 (Qwen Team 2026), the dense ones: Qwen3-Next without experts, and a gated delta
net's input projections are stored apart."""

from typing import Any

from lit_gpt.families import llama, qwen3_next
from lit_gpt.families.tables import Stacked, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("qwen3_5_text",)
WRAPPERS = ("qwen3_5",)  # all that are published, which read images and videos
# What transformers takes for fields that a config.json leaves out.
DEFAULTS = {"qwen3_5_text": dict(max_position_embeddings=32768, intermediate_size=12288)}

PRESETS = {
    "Qwen3.5-9B": llama.preset(32, 16, 4, 4096, 12288, 248320, model_type="qwen3_5_text", head_dim=256,
                               max_position_embeddings=262144, rope_theta=1e7, partial_rotary_factor=0.25),
}  # fmt: skip


def config(hf: dict[str, Any]) -> dict[str, Any]:
    return qwen3_next.hybrid(hf)


def weights(config: Config) -> Table:
    heads, keys = config.state_heads, config.state_groups * config.state_size
    values, projections = heads * config.state_head_size, "model.layers.{}.linear_attn.in_proj_"
    names = tuple(projections + part for part in ("qkv", "z", "b", "a"))
    apart = Stacked(names, (2 * keys + values, values, heads, heads))
    return {**qwen3_next.hybrid_weights(config), "h.{}.mixer.qkv": apart}


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import Qwen3_5TextConfig

    size = qwen3_next.tiny_size_of_hybrid(**fields)
    return {"qwen3_5": Qwen3_5TextConfig(**size, tie_word_embeddings=True)}
