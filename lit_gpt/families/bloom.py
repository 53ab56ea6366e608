"""BLOOM (BigScience 2022): ALiBi in the place of position embeddings, and a norm of the token embedding."""

from typing import Any

from lit_gpt.families.fields import refuse
from lit_gpt.families.tables import Grouped, Layout, Said, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("bloom",)


def _preset(layers: int, heads: int, hidden: int) -> dict[str, Any]:
    return dict(model_type="bloom", n_layer=layers, n_head=heads, hidden_size=hidden, vocab_size=250880)


PRESETS = {
    "bloom-560m": _preset(24, 16, 1024),
    "bloom-1b1": _preset(24, 16, 1536),
    "bloom-1b7": _preset(24, 16, 2048),
    "bloom-3b": _preset(30, 32, 2560),
    "bloom-7b1": _preset(30, 32, 4096),
}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    refuse(hf, apply_residual_connection_post_layernorm=False)
    layers = hf.get("n_layer") or hf["num_hidden_layers"]
    return {
        "n_layer": layers,
        "n_head": hf.get("n_head") or hf["num_attention_heads"],
        "n_embd": hf.get("hidden_size") or hf["n_embed"],
        "vocab_size": hf["vocab_size"],
        "block_size": hf.get("seq_length", 2048),
        "alibi": True,
        "unrotated_layers": list(range(layers)),
        "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        "activation": "gelu_tanh",
        **dict.fromkeys(("bias", "qkv_bias", "proj_bias"), True),
        "embedding_norm": True,
        "tie_embeddings": hf.get("tie_word_embeddings", True),
    }


def weights(config: Config) -> Table:
    layer = "transformer.h.{}."
    return {
        "wte": "transformer.word_embeddings",
        "ln_e": "transformer.word_embeddings_layernorm",
        "h.{}.norm_1": layer + "input_layernorm",
        "h.{}.norm_2": layer + "post_attention_layernorm",
        "h.{}.attn.qkv": Grouped((layer + "self_attention.query_key_value",), config.n_head, 1),
        "h.{}.attn.proj": layer + "self_attention.dense",
        "h.{}.mlp.fc": layer + "mlp.dense_h_to_4h",
        "h.{}.mlp.proj": layer + "mlp.dense_4h_to_h",
        "ln_f": "transformer.ln_f",
        "lm_head": "lm_head",
    }


ARCHITECTURES = ("bloom",)


def gguf(config: Config) -> Layout:
    qkv = {"h.{}.attn.qkv": "blk.{}.attn_qkv"}
    return Layout("bloom", ("gelu_tanh",), places=qkv, unread="")


def from_gguf(said: Said) -> dict[str, Any]:
    return {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "n_layer": said.need("block_count", int),
        "n_head": said.need("attention.head_count", int),
        "seq_length": said.need("context_length", int),
        "layer_norm_epsilon": said.need("attention.layer_norm_epsilon", float),
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import BloomConfig

    size: dict[str, Any] = dict(vocab_size=96, hidden_size=96, n_layer=2, n_head=6) | fields
    return {"bloom": BloomConfig(**size)}
