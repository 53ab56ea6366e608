"""Seed-OSS (ByteDance Seed 2025): Llama with biases of query, key and value."""

from typing import Any

from lit_gpt.families import llama
from lit_gpt.families.fields import tiny_size
from lit_gpt.families.tables import Layout, Said
from lit_gpt.model.config import Config

MODEL_TYPES = ("seed_oss",)
# What transformers takes for fields that a config.json leaves out.
DEFAULTS = {"seed_oss": dict(max_position_embeddings=524288, num_key_value_heads=8)}

_36B: dict[str, Any] = llama.preset(
    64, 80, 8, 5120, 27648, 155136, model_type="seed_oss", head_dim=128, max_position_embeddings=524288, rope_theta=1e7
)
PRESETS = {"Seed-OSS-36B-Base": _36B, "Seed-OSS-36B-Instruct": _36B}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    biases = {"qkv_bias": hf.get("attention_bias", True), "proj_bias": hf.get("attention_out_bias", False)}
    return llama.config({"head_dim": 128} | hf) | biases


weights = llama.weights


ARCHITECTURES = ("seed_oss",)


def gguf(config: Config) -> Layout:
    return Layout("seed_oss", places={"h.{}.norm_2": "blk.{}.post_attention_norm"})


def from_gguf(said: Said) -> dict[str, Any]:
    out = said.holds("blk.0.attn_output.bias")
    return {"architectures": ["SeedOssForCausalLM"], "model_type": "seed_oss", "attention_out_bias": out}


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import SeedOssConfig

    own: dict[str, Any] = dict(num_key_value_heads=2, head_dim=24, pad_token_id=None)
    return {"seed_oss": SeedOssConfig(**tiny_size(**own | fields))}
