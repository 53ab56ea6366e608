"""Hunyuan without experts (Tencent 2025): Llama with norms of queries and keys behind the rotation."""

from typing import Any

from lit_gpt.families import llama
from lit_gpt.families.fields import tiny_size
from lit_gpt.families.tables import Layout, Said, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("hunyuan_v1_dense",)

PRESETS: dict[str, dict[str, Any]] = {}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    values = llama.config({"rms_norm_eps": 1e-5} | hf) | {"qk_norm": "head", "qk_norm_rotated": True}
    values["bias"] = False  # whatever mlp_bias says
    size = values["head_size"] or hf["hidden_size"] // hf["num_attention_heads"]
    scaling = values["rope_scaling"] or {}
    if scaling.get("rope_type") == "dynamic" and scaling.get("alpha"):
        # dynamic in name only: alpha stretches the base once and for all
        stretch = scaling["alpha"] ** (size / (size - 2))
        values |= {"rope_base": values["rope_base"] * stretch, "rope_scaling": None}
    return values


def weights(config: Config) -> Table:
    attention = "model.layers.{}.self_attn."
    return {
        **llama.weights(config),
        "h.{}.attn.qk_norm.q": attention + "query_layernorm",
        "h.{}.attn.qk_norm.k": attention + "key_layernorm",
    }


ARCHITECTURES = ("hunyuan-dense",)


def gguf(config: Config) -> Layout:
    return Layout("hunyuan-dense")


def from_gguf(said: Said) -> dict[str, Any]:
    return {"architectures": ["HunYuanDenseV1ForCausalLM"], "model_type": "hunyuan_v1_dense"}


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import HunYuanDenseV1Config

    size = tiny_size(**dict(num_key_value_heads=2, head_dim=24, pad_token_id=None) | fields)
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0}
    return {"hunyuan": HunYuanDenseV1Config(**size, rope_parameters=dynamic)}
