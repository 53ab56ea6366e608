"""Apertus (Swiss AI 2025): Llama with a plain MLP, an activation whose curve trains, and norms of queries and keys."""

from typing import Any

from lit_gpt.families import llama, qwen
from lit_gpt.families.fields import refuse, tiny_size
from lit_gpt.families.tables import Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("apertus",)
# What transformers takes for fields that a config.json leaves out.
DEFAULTS = {"apertus": dict(max_position_embeddings=65536)}

_SCALING: dict[str, Any] = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8192)  # fmt: skip
_8B: dict[str, Any] = llama.preset(
    32, 32, 8, 4096, 21504, 131072, model_type="apertus", max_position_embeddings=65536, rms_norm_eps=1e-5,
    rope_theta=12000000.0, rope_scaling=_SCALING,
)  # fmt: skip
PRESETS = {"Apertus-8B-2509": _8B, "Apertus-8B-Instruct-2509": _8B}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    refuse(hf, hidden_act="xielu")
    default = {"rope_parameters": {"rope_theta": 12000000.0, **_SCALING}}
    fields = hf if hf.get("rope_parameters") or hf.get("rope_theta") else hf | default
    own = {"qk_norm": "head", "bias": False, "mlp_class": "XIELUMLP", "activation": "xielu"}
    return llama.config({"rms_norm_eps": 1e-5} | fields) | own


def weights(config: Config) -> Table:
    layer = "model.layers.{}."
    return {
        **qwen.weights(config),
        "h.{}.norm_1": layer + "attention_layernorm",
        "h.{}.norm_2": layer + "feedforward_layernorm",
        "h.{}.mlp.fc": layer + "mlp.up_proj",
        "h.{}.mlp.xielu": layer + "mlp.act_fn",
        "h.{}.mlp.proj": layer + "mlp.down_proj",
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import ApertusConfig

    scaling = _SCALING | {"rope_theta": 1e4, "original_max_position_embeddings": 32}
    own: dict[str, Any] = dict(num_key_value_heads=2, pad_token_id=None, rope_parameters=scaling)
    return {"apertus": ApertusConfig(**tiny_size(**own | fields))}
