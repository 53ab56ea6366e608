"""MPT (MosaicML 2023): ALiBi in the place of position embeddings, and no biases."""

from typing import Any

from lit_gpt.families.fields import refuse
from lit_gpt.families.tables import Layout, Said, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("mpt",)

_7B: dict[str, Any] = dict(model_type="mpt", n_layers=32, n_heads=32, d_model=4096, vocab_size=50432, max_seq_len=2048)
_30B: dict[str, Any] = dict(_7B, n_layers=48, n_heads=64, d_model=7168, max_seq_len=8192)
PRESETS = {
    "mpt-7b": _7B,
    "mpt-7b-instruct": _7B,
    "mpt-7b-chat": _7B,
    "mpt-7b-8k": dict(_7B, max_seq_len=8192),
    "mpt-30b": _30B,
    "mpt-30b-instruct": _30B,
    "mpt-30b-chat": _30B,
}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    refuse(hf, no_bias=True, logit_scale=None)
    attention: dict[str, Any] = dict(
        attn_type="multihead_attention", alibi=True, alibi_bias_max=8, clip_qkv=None, qk_ln=False
    )
    refuse(hf.get("attn_config") or {}, **attention, softmax_scale=None, prefix_lm=False)
    return {
        "n_layer": hf["n_layers"],
        "n_head": hf["n_heads"],
        "n_embd": hf["d_model"],
        "vocab_size": hf["vocab_size"],
        "block_size": hf.get("max_seq_len", 2048),
        "alibi": True,
        "unrotated_layers": list(range(hf["n_layers"])),
        "norm_class": "BiaslessLayerNorm",
        "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        "intermediate_size": hf.get("expansion_ratio", 4) * hf["d_model"],
        "tie_embeddings": hf.get("tie_word_embeddings", True),
    }


def weights(config: Config) -> Table:
    layer = "transformer.blocks.{}."
    return {
        "wte": "transformer.wte",
        "h.{}.norm_1": layer + "norm_1",
        "h.{}.norm_2": layer + "norm_2",
        "h.{}.attn.qkv": layer + "attn.Wqkv",
        "h.{}.attn.proj": layer + "attn.out_proj",
        "h.{}.mlp.fc": layer + "ffn.up_proj",
        "h.{}.mlp.proj": layer + "ffn.down_proj",
        "ln_f": "transformer.norm_f",
        "lm_head": "lm_head",
    }


ARCHITECTURES = ("mpt",)


def gguf(config: Config) -> Layout:
    alibi = {"attention.max_alibi_bias": 8.0}
    qkv = {"h.{}.attn.qkv": "blk.{}.attn_qkv"}
    return Layout("mpt", ("gelu",), metadata=alibi, places=qkv)


def from_gguf(said: Said) -> dict[str, Any]:
    width = said.need("embedding_length", int)
    return {
        "architectures": ["MptForCausalLM"],
        "model_type": "mpt",
        "n_layers": said.need("block_count", int),
        "n_heads": said.need("attention.head_count", int),
        "d_model": width,
        "expansion_ratio": said.need("feed_forward_length", int) // width,
        "max_seq_len": said.need("context_length", int),
        "layer_norm_epsilon": said.need("attention.layer_norm_epsilon", float),
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import MptConfig

    size: dict[str, Any] = dict(vocab_size=96, d_model=96, n_layers=2, n_heads=6, max_seq_len=256) | fields
    return {"mpt": MptConfig(**size)}
