"""GLM 4 (GLM Team 2024): Llama with biases of query, key and value, and half of each head rotated, by neighbors; from
the models of April 2025 on with norms behind attention and MLP, too."""

from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families import llama
from lit_gpt.families.fields import rope, tiny_size
from lit_gpt.families.tables import Layout, Said, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("glm", "glm4")
# What transformers takes for fields that a config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "glm": dict(max_position_embeddings=131072, num_key_value_heads=2),
    "glm4": dict(max_position_embeddings=131072, num_key_value_heads=2, attention_bias=True),
}

_9B: dict[str, Any] = llama.preset(
    40, 32, 2, 4096, 13696, 151552, model_type="glm", head_dim=128, max_position_embeddings=131072,
    rms_norm_eps=1.5625e-7, attention_bias=True, partial_rotary_factor=0.5,
)  # fmt: skip
PRESETS = {
    "glm-4-9b-chat-hf": _9B,
    "GLM-4-9B-0414": dict(_9B, model_type="glm4", max_position_embeddings=32768, rms_norm_eps=1e-5),
}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    two = hf["model_type"] == "glm4"
    return llama.config({"head_dim": 128, "rms_norm_eps": 1.5625e-7} | hf) | {
        "qkv_bias": hf.get("attention_bias", not two),
        "proj_bias": False,
        "bias": False,
        "post_norm": two,
        **rope({"partial_rotary_factor": 0.5} | hf),  # the family's default
    }


def weights(config: Config) -> Table:
    layer = "model.layers.{}."
    return {
        **llama.weights(config),
        **llama.turned_qkv(config),
        "h.{}.mlp.gate_up": layer + "mlp.gate_up_proj",
        "h.{}.post_norm_1": layer + "post_self_attn_layernorm",
        "h.{}.post_norm_2": layer + "post_mlp_layernorm",
    }


ARCHITECTURES = ("glm4", "chatglm")


def gguf(config: Config) -> Layout:
    if config.tie_embeddings:
        raise UserError("--format gguf: llama.cpp's glm4 and chatglm have heads of their own")
    if not config.post_norm and config.n_head * config.head_size != config.n_embd:
        raise UserError("--format gguf: llama.cpp's chatglm has heads whose sizes sum to the embedding's")
    fused = {"h.{}.mlp.gate_up": "blk.{}.ffn_up"}
    return Layout("glm4" if config.post_norm else "chatglm", interleaved=True, places=fused)


def from_gguf(said: Said) -> dict[str, Any]:
    kind = "glm4" if said.architecture == "glm4" else "glm"
    head_size = said.get("attention.key_length", int) or (
        said.need("embedding_length", int) // said.need("attention.head_count", int)
    )
    rotated = said.get("rope.dimension_count", int, head_size) / head_size
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "partial_rotary_factor": rotated,
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import Glm4Config, GlmConfig

    size = tiny_size(**dict(num_key_value_heads=2, head_dim=24, pad_token_id=None, eos_token_id=2) | fields)
    return {"glm": GlmConfig(**size), "glm4": Glm4Config(**size, attention_bias=True)}
