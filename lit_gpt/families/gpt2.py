"""GPT-2 (Radford et al. 2019) with its learned positions, DistilGPT2, and Cerebras-GPT."""

from typing import Any

from lit_gpt.families.fields import activation, refuse
from lit_gpt.families.tables import Layout, Said, Table, Transposed
from lit_gpt.model.config import Config

MODEL_TYPES = ("gpt2",)
DERIVED = ("*.attn.bias", "*.attn.masked_bias")


def _preset(layers: int, heads: int, hidden: int, **fields: Any) -> dict[str, Any]:
    own = dict(model_type="gpt2", n_layer=layers, n_head=heads, n_embd=hidden, vocab_size=50257, n_positions=1024)
    return own | fields


_CEREBRAS: dict[str, Any] = dict(n_positions=2048, activation_function="gelu")
PRESETS = {
    "distilgpt2": _preset(6, 12, 768),
    "gpt2": _preset(12, 12, 768),
    "gpt2-medium": _preset(24, 16, 1024),
    "gpt2-large": _preset(36, 20, 1280),
    "gpt2-xl": _preset(48, 25, 1600),
    "Cerebras-GPT-111M": _preset(10, 12, 768, **_CEREBRAS),
    "Cerebras-GPT-256M": _preset(14, 17, 1088, **_CEREBRAS),
    "Cerebras-GPT-590M": _preset(18, 12, 1536, **_CEREBRAS),
    "Cerebras-GPT-1.3B": _preset(24, 16, 2048, **_CEREBRAS),
    "Cerebras-GPT-2.7B": _preset(32, 32, 2560, **_CEREBRAS),
    "Cerebras-GPT-6.7B": _preset(32, 32, 4096, **_CEREBRAS),
    "Cerebras-GPT-13B": _preset(40, 40, 5120, **_CEREBRAS),
}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    refuse(hf, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return {
        "n_layer": hf["n_layer"],
        "n_head": hf["n_head"],
        "n_embd": hf["n_embd"],
        "vocab_size": hf["vocab_size"],
        "block_size": hf["n_positions"],
        "learned_positions": True,
        "unrotated_layers": list(range(hf["n_layer"])),
        "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        "activation": activation(hf.get("activation_function", "gelu_new")),
        "intermediate_size": hf.get("n_inner") or 0,
        "bias": True,
        "qkv_bias": True,
        "proj_bias": True,
        "tie_embeddings": hf.get("tie_word_embeddings", True),
    }


def weights(config: Config) -> Table:
    layer = "transformer.h.{}."
    return {
        "wte": "transformer.wte",
        "wpe": "transformer.wpe",
        "h.{}.norm_1": layer + "ln_1",
        "h.{}.norm_2": layer + "ln_2",
        "h.{}.attn.qkv": Transposed((layer + "attn.c_attn",)),
        "h.{}.attn.proj": Transposed((layer + "attn.c_proj",)),
        "h.{}.mlp.fc": Transposed((layer + "mlp.c_fc",)),
        "h.{}.mlp.proj": Transposed((layer + "mlp.c_proj",)),
        "ln_f": "transformer.ln_f",
        "lm_head": "lm_head",
    }


ARCHITECTURES = ("gpt2",)


def gguf(config: Config) -> Layout:
    return fused("gpt2")


def fused(architecture: str) -> Layout:
    """Return a layout of llama.cpp in which queries, keys and values are one product, as here."""
    qkv = {"h.{}.attn.qkv": "blk.{}.attn_qkv"}
    return Layout(architecture, ("gelu_tanh", "gelu"), places=qkv, unread="takes not all fields over")


def from_gguf(said: Said) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": said.need("block_count", int),
        "n_head": said.need("attention.head_count", int),
        "n_embd": said.need("embedding_length", int),
        "n_inner": said.need("feed_forward_length", int),
        "n_positions": said.need("context_length", int),
        "layer_norm_epsilon": said.need("attention.layer_norm_epsilon", float),
        "activation_function": "gelu_pytorch_tanh",
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import GPT2Config

    size: dict[str, Any] = dict(
        vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_inner=112, n_positions=64, bos_token_id=1, eos_token_id=2
    ) | fields  # fmt: skip
    return {"gpt2": GPT2Config(**size)}
