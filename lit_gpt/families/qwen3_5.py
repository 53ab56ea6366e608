"""The language models of Qwen 3.5 (Qwen Team 2026), the dense ones: Qwen3-Next without experts, and a gated delta
net's input projections are stored apart."""

from typing import Any

from lit_gpt.families import llama, qwen3_next
from lit_gpt.families.tables import (
    Decay,
    Layout,
    Named,
    Place,
    Reordered,
    ReorderedColumns,
    Said,
    Squeezed,
    Stacked,
    Table,
    chained,
)
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


ARCHITECTURES = ("qwen35",)


def gguf(config: Config) -> Layout:
    return apart_gguf("qwen35", config)


def apart_gguf(architecture: str, config: Config) -> Layout:
    """Return llama.cpp's layout, in which each group's first head comes first, then each group's second, and so on."""
    groups, size, heads = config.state_groups, config.state_head_size, config.state_heads
    own, keys = heads // groups, config.state_groups * config.state_size
    by_head = tuple(place * groups + group for group in range(groups) for place in range(own))
    by_value = tuple(head * size + i for head in by_head for i in range(size))
    convolved = (*range(2 * keys), *(2 * keys + i for i in by_value))
    modules = tuple("blk.{}." + name for name in ("attn_qkv", "attn_gate", "ssm_beta", "ssm_alpha"))
    orders = (convolved, by_value, by_head, by_head)
    heads_apart = Reordered((), (heads,), (by_head,))
    mixer: dict[str, str | Place] = {
        "h.{}.mixer.qkv": Reordered(modules, tuple(map(len, orders)), orders),
        "h.{}.mixer.conv": chained(Reordered((), (len(convolved),), (convolved,)), Squeezed(("blk.{}.ssm_conv1d",), 1)),
        "h.{}.mixer.A_log": chained(Decay(()), heads_apart, Named(("blk.{}.ssm_a",))),
        "h.{}.mixer.dt_bias": chained(heads_apart, Named(("blk.{}.ssm_dt.bias",))),
        "h.{}.mixer.norm": "blk.{}.ssm_norm",
        "h.{}.mixer.proj": chained(ReorderedColumns((), by_value), Place(("blk.{}.ssm_out",))),
    }
    # which of the rotated pairs know a picture's time, height and width; of text all are the same
    sections = {"rope.dimension_sections": [11, 11, 10, 0]}
    return qwen3_next.hybrid_gguf(architecture, config, mixer, **sections)


def from_gguf(said: Said) -> dict[str, Any]:
    own = {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text"}
    return own | qwen3_next.hybrid_from_gguf(said)


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import Qwen3_5TextConfig

    size = qwen3_next.tiny_size_of_hybrid(**fields)
    return {"qwen3_5": Qwen3_5TextConfig(**size, tie_word_embeddings=True)}
