"""Gemma 1, 2 and 3 (Gemma Team 2024, 2024, 2025); Gemma 3 without images.

All scale their embeddings and store a norm's weight as its distance from 1. From Gemma 2 on what attention and MLP
give goes through norms too, and some layers have a window. Gemma 2 caps scores and logits; Gemma 3 norms queries and
keys.
"""

from functools import partial
from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families import llama, qwen
from lit_gpt.families.fields import activation, tiny_size, two_ropes, windows
from lit_gpt.families.tables import Layout, Said, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("gemma", "gemma2", "gemma3_text")
WRAPPERS = ("gemma3",)  # from 4B on
# What transformers takes for fields that a config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": dict(max_position_embeddings=8192, num_key_value_heads=16),
    "gemma2": dict(max_position_embeddings=8192, num_key_value_heads=4, sliding_window=4096,
                   final_logit_softcapping=30.0, attn_logit_softcapping=50.0),
    "gemma3_text": dict(max_position_embeddings=131072, num_key_value_heads=4, sliding_window=4096,
                        num_attention_heads=8, head_dim=256, vocab_size=262208),
}  # fmt: skip


_preset = partial(llama.preset, vocab=256000, max_position_embeddings=8192, head_dim=256, tie_word_embeddings=True)
_CAPS: dict[str, Any] = dict(final_logit_softcapping=30.0, attn_logit_softcapping=50.0)
_GEMMA_2: dict[str, Any] = dict(_CAPS, model_type="gemma2", query_pre_attn_scalar=256, sliding_window=4096)
_GEMMA_3: dict[str, Any] = dict(
    model_type="gemma3_text", vocab=262144, max_position_embeddings=32768, query_pre_attn_scalar=256, sliding_window=512
)
_GEMMA_3_LARGE: dict[str, Any] = dict(_GEMMA_3, vocab=262208, max_position_embeddings=131072, sliding_window=1024,
                                      rope_scaling={"rope_type": "linear", "factor": 8.0})  # fmt: skip
PRESETS = {
    "gemma-2b": _preset(18, 8, 1, 2048, 16384, model_type="gemma"),
    "gemma-7b": _preset(28, 16, 16, 3072, 24576, model_type="gemma"),
    "gemma-2-2b": _preset(26, 8, 4, 2304, 9216, **_GEMMA_2),
    "gemma-2-9b": _preset(42, 16, 8, 3584, 14336, **_GEMMA_2),
    "gemma-2-27b": _preset(46, 32, 16, 4608, 36864, **dict(_GEMMA_2, query_pre_attn_scalar=144), head_dim=128),
    "gemma-3-270m": _preset(18, 4, 1, 640, 2048, **_GEMMA_3),
    "gemma-3-1b": _preset(26, 4, 1, 1152, 6912, **_GEMMA_3),
    # the language models of those that read images
    "gemma-3-4b": _preset(34, 8, 4, 2560, 10240, **_GEMMA_3_LARGE),
    "gemma-3-12b": _preset(48, 16, 8, 3840, 15360, **_GEMMA_3_LARGE),
    "gemma-3-27b": _preset(62, 32, 16, 5376, 21504, **dict(_GEMMA_3_LARGE, query_pre_attn_scalar=168), head_dim=128),
}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    if hf.get("use_bidirectional_attention"):
        raise UserError("config.json: 'use_bidirectional_attention' is not supported; expected a causal Gemma")
    kind, layers = hf["model_type"], hf["num_hidden_layers"]
    act = hf.get("hidden_act" if kind == "gemma" else "hidden_activation") or "gelu_pytorch_tanh"
    if kind == "gemma" and act == "gelu":
        act = "gelu_pytorch_tanh"  # what the first files mean by it
    common = llama.config(hf) | {
        "head_size": hf.get("head_dim") or 256,
        "norm_class": "UnitOffsetRMSNorm",
        "embedding_scale": hf["hidden_size"] ** 0.5,
        "tie_embeddings": hf.get("tie_word_embeddings", True),
        "activation": activation(act),
    }
    if kind == "gemma":
        return common
    period = 2 if kind == "gemma2" else hf.get("sliding_window_pattern") or 6
    kinds = ["sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(layers)]
    from_2_on = {
        "post_norm": True,
        "attention_scale": hf.get("query_pre_attn_scalar", 256) ** -0.5,
        "attention_softcap": hf.get("attn_logit_softcapping"),
        "logit_softcap": hf.get("final_logit_softcapping"),
        **windows(hf, kinds),
    }
    return (
        common
        | from_2_on
        | (two_ropes(hf, base=1e6, local_base=1e4) | {"qk_norm": "head"} if kind == "gemma3_text" else {})
    )


def weights(config: Config) -> Table:
    if not config.post_norm:
        return llama.weights(config)
    layer = "model.layers.{}."
    return {
        **qwen.weights(config),
        "h.{}.post_norm_1": layer + "post_attention_layernorm",
        "h.{}.norm_2": layer + "pre_feedforward_layernorm",
        "h.{}.post_norm_2": layer + "post_feedforward_layernorm",
    }


ARCHITECTURES = ("gemma", "gemma2", "gemma3")


def gguf(config: Config) -> Layout:
    kind, period = ("gemma", 1) if not config.post_norm else ("gemma3", 6) if config.qk_norm else ("gemma2", 2)
    largest = (kind, config.n_layer) in (("gemma2", 46), ("gemma3", 62))
    scale = (config.n_embd // config.n_head if largest else config.head_size) ** -0.5
    layers = [layer for layer in range(config.n_layer) if (layer + 1) % period == 0]
    if config.sliding_window and layers != config.global_layers or config.local_rope_base not in (None, 1e4):
        raise UserError(f"--format gguf: llama.cpp's {kind} has no window in each {period}th layer, elsewhere base 1e4")
    if config.attention_scale not in (None, scale) or not config.tie_embeddings:
        raise UserError(f"--format gguf: llama.cpp's {kind} ties its head, and scales scores by {scale:.4g}")
    further = {
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "attention.sliding_window": config.sliding_window,
    }
    published = (config.attention_softcap, config.logit_softcap, config.head_size) == (50.0, 30.0, 256)
    unread = {"gemma": "does not know the architecture", "gemma2": "" if published else "takes caps to be as published"}
    return Layout(
        kind, ("gelu_tanh",), norm_offset=1.0, keeps_window=True, metadata=further, unread=unread.get(kind, "")
    )


def from_gguf(said: Said) -> dict[str, Any]:
    names = {"gemma": "Gemma", "gemma2": "Gemma2", "gemma3": "Gemma3"}
    common = {"architectures": [f"{names[said.architecture]}ForCausalLM"], "hidden_activation": "gelu_pytorch_tanh"}
    if said.architecture == "gemma":
        return common | {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"}
    layers, period = said.need("block_count", int), 2 if said.architecture == "gemma2" else 6
    window = said.get("attention.sliding_window", int, 0) or 4096
    largest = layers == (46 if said.architecture == "gemma2" else 62)  # which scales by the mean size of a head
    mean = said.need("embedding_length", int) // said.need("attention.head_count", int)
    return common | {
        "model_type": "gemma2" if said.architecture == "gemma2" else "gemma3_text",
        "sliding_window": window,
        "layer_types": ["sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(layers)],
        "query_pre_attn_scalar": mean if largest else said.need("attention.key_length", int),
        "attn_logit_softcapping": said.get("attn_logit_softcapping", float),
        "final_logit_softcapping": said.get("final_logit_softcapping", float),
        **({"rope_local_base_freq": 10000.0} if said.architecture == "gemma3" else {}),
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import Gemma2Config, Gemma3TextConfig, GemmaConfig

    size = tiny_size(**dict(head_dim=24, pad_token_id=None) | fields)
    caps: dict[str, Any] = dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
    ropes = {"full_attention": linear, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    window: dict[str, Any] = dict(num_key_value_heads=2, sliding_window=5, query_pre_attn_scalar=20)
    gemma_3 = dict(window, sliding_window_pattern=2, rope_parameters=ropes)
    return {
        "gemma": GemmaConfig(**size, num_key_value_heads=1),
        "gemma2": Gemma2Config(**size, **window, **caps),
        "gemma3": Gemma3TextConfig(**size, **gemma_3),
    }
