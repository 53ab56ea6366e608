"""Phi-3, 3.5 and 4 (Abdin et al. 2024): Llama with projections that are stored as one, stretched by LongRoPE."""

from functools import partial
from typing import Any

from lit_gpt.families import llama
from lit_gpt.families.fields import tiny_size
from lit_gpt.families.tables import Layout, Said, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("phi3",)
# What transformers takes for fields that a config.json leaves out.
DEFAULTS = {"phi3": dict(max_position_embeddings=4096)}

# Divisors of the rotary frequencies, rounded to what is not noise of float32.
_SHORT_3_5 = [
    1.0, 1.02, 1.03, 1.03, *[1.05] * 5, 1.07, 1.1, 1.11, 1.16, 1.16, 1.17, 1.29, 1.34, 1.68, 1.79, 1.82, 1.85, 1.88,
    1.91, 1.94, 1.99, *[2.02] * 6, *[2.03] * 9, 2.08, 2.09, 2.19, 2.22, 2.59, 2.73, 2.75, 2.84,
]  # fmt: skip
_LONG_3_5 = [
    1.08, 1.11, 1.14, 1.34, 1.59, 1.6, 1.62, 2.62, 3.23, 3.23, 4.79, 7.4, 7.7, 9.09, 12.2, 17.67, 24.46, 28.57, 30.42,
    30.84, 32.59, 32.93, 42.32, 44.96, 50.34, 50.45, 57.55, 57.93, 58.21, 60.14, 62.61, 62.62, 62.71, 63.14, 63.14,
    63.77, 63.93, 63.96, 63.97, 64.03, 64.07, 64.08, 64.12, 64.41, 64.48, 64.51, 64.53, 64.84,
]  # fmt: skip
_LONG_4 = [
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
    2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424, 6.693110555,
    7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283,
    20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7,
    32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
]  # fmt: skip


_preset = partial(llama.preset, model_type="phi3", vocab=32064, max_position_embeddings=4096, rms_norm_eps=1e-5)


def _long(short_factor: list[float], long_factor: list[float]) -> dict[str, Any]:
    scaling = {"type": "longrope", "short_factor": short_factor, "long_factor": long_factor}
    return dict(max_position_embeddings=131072, original_max_position_embeddings=4096, rope_scaling=scaling,
                sliding_window=262144)  # fmt: skip


PRESETS = {
    "Phi-3-mini-4k": _preset(32, 32, 32, 3072, 8192, sliding_window=2047),
    "Phi-3-medium-4k": _preset(40, 40, 10, 5120, 17920, sliding_window=2047),
    "Phi-3.5-mini": _preset(32, 32, 32, 3072, 8192, **_long(_SHORT_3_5, _LONG_3_5)),
    "phi-4": _preset(40, 40, 10, 5120, 17920, vocab=100352, max_position_embeddings=16384, rope_theta=250000.0),
    "Phi-4-mini": _preset(32, 24, 8, 3072, 8192, vocab=200064, partial_rotary_factor=0.75, tie_word_embeddings=True,
                          **_long([1.0] * 48, _LONG_4)),
}  # fmt: skip


def config(hf: dict[str, Any]) -> dict[str, Any]:
    values = llama.config(hf) | {"sliding_window": hf.get("sliding_window"), "norm_eps": hf.get("rms_norm_eps", 1e-5)}
    if scaling := values["rope_scaling"]:
        # the first files say "su" or "yarn", and all leave the original context beside the dictionary
        original = hf.get("original_max_position_embeddings", 4096)
        named = "longrope" if scaling["rope_type"] in ("su", "yarn") else scaling["rope_type"]
        values["rope_scaling"] = {**scaling, "original_max_position_embeddings": original, "rope_type": named}
    return values


def weights(config: Config) -> Table:
    fused = {
        "h.{}.attn.qkv": "model.layers.{}.self_attn.qkv_proj",
        "h.{}.mlp.gate_up": "model.layers.{}.mlp.gate_up_proj",
    }
    return {**llama.weights(config), **fused}


ARCHITECTURES = ("phi3",)


def gguf(config: Config) -> Layout:
    fused = {"h.{}.attn.qkv": "blk.{}.attn_qkv", "h.{}.mlp.gate_up": "blk.{}.ffn_up"}
    return Layout("phi3", metadata={"attention.sliding_window": 0}, places=fused, unread="")


def from_gguf(said: Said) -> dict[str, Any]:
    head_size = said.get("attention.key_length", int) or (
        said.need("embedding_length", int) // said.need("attention.head_count", int)
    )
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "sliding_window": said.get("attention.sliding_window", int) or None,
        "partial_rotary_factor": said.get("rope.dimension_count", int, head_size) / head_size,
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import Phi3Config

    size = tiny_size(**dict(pad_token_id=None, bos_token_id=1, eos_token_id=2) | fields)
    divisors = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0]}
    # a part of each head rotated, as in Phi-4-mini
    scaling = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, **divisors}
    long: dict[str, Any] = dict(original_max_position_embeddings=32, num_key_value_heads=2, rope_parameters=scaling)
    return {
        "phi3": Phi3Config(**size, sliding_window=5),
        "longrope": Phi3Config(**size, **long, tie_word_embeddings=True),
    }
