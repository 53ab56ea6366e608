"""Phi-1, 1.5 and 2 (Li et al. 2023): attention and MLP side by side behind one norm, biases everywhere, and only a part
of each head rotated."""

from typing import Any

from lit_gpt.families.fields import activation, rope, sizes, tiny_size
from lit_gpt.families.tables import Layout, Said, Stacked, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("phi",)


def _preset(layers: int, hidden: int, rotated: float) -> dict[str, Any]:
    return dict(
        model_type="phi", num_hidden_layers=layers, num_attention_heads=32, hidden_size=hidden,
        intermediate_size=4 * hidden, vocab_size=51200, max_position_embeddings=2048, layer_norm_eps=1e-5,
        partial_rotary_factor=rotated,
    )  # fmt: skip


PRESETS = {"phi-1": _preset(24, 2048, 0.5), "phi-1_5": _preset(24, 2048, 0.5), "phi-2": _preset(32, 2560, 0.4)}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    return {
        **sizes(hf),
        "n_query_groups": hf.get("num_key_value_heads") or hf["num_attention_heads"],
        "qk_norm": "head" if hf.get("qk_layernorm") else None,
        "parallel_residual": True,
        "shared_attention_norm": True,
        "norm_eps": hf.get("layer_norm_eps", 1e-5),
        "activation": activation(hf.get("hidden_act", "gelu_new")),
        "intermediate_size": hf["intermediate_size"],
        **dict.fromkeys(("bias", "qkv_bias", "proj_bias", "head_bias"), True),
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        **rope({"partial_rotary_factor": 0.5} | hf),  # the family's default
    }


def weights(config: Config) -> Table:
    layer = "model.layers.{}."
    return {
        "wte": "model.embed_tokens",
        "h.{}.norm_1": layer + "input_layernorm",
        "h.{}.attn.qkv": Stacked(tuple(f"{layer}self_attn.{x}_proj" for x in "qkv"), config.qkv_sizes),
        "h.{}.attn.qk_norm.q": layer + "self_attn.q_layernorm",
        "h.{}.attn.qk_norm.k": layer + "self_attn.k_layernorm",
        "h.{}.attn.proj": layer + "self_attn.dense",
        "h.{}.mlp.fc": layer + "mlp.fc1",
        "h.{}.mlp.proj": layer + "mlp.fc2",
        "ln_f": "model.final_layernorm",
        "lm_head": "lm_head",
    }


ARCHITECTURES = ("phi2",)


def gguf(config: Config) -> Layout:
    return Layout("phi2", ("gelu_tanh",))


def from_gguf(said: Said) -> dict[str, Any]:
    head_size = said.need("embedding_length", int) // said.need("attention.head_count", int)
    return {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "hidden_act": "gelu_new",
        "layer_norm_eps": said.need("attention.layer_norm_epsilon", float),
        "partial_rotary_factor": said.get("rope.dimension_count", int, head_size) / head_size,
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import PhiConfig

    size = tiny_size(**fields)
    return {
        "phi2": PhiConfig(**size),
        "qk-norm": PhiConfig(**size, num_key_value_heads=2, qk_layernorm=True),
    }
