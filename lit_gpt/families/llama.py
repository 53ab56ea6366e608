"""Llama 1, 2 and 3.x (Touvron et al. 2023, Dubey et al. 2024) and what is built like it: Mistral with its window,
TinyLlama, OpenLLaMA, Vicuna, CodeLlama, SmolLM2."""

from typing import Any

from lit_gpt.families.fields import activation, rope, sizes, tiny_size
from lit_gpt.families.tables import Layout, Said, Stacked, Table, Turned, neighbors_apart
from lit_gpt.model.config import Config

MODEL_TYPES = ("llama", "mistral")
WRAPPERS = ("mistral3",)  # Mistral Small 3.1 and later, Ministral 3
# What transformers takes for fields that a config.json leaves out.
DEFAULTS = {"mistral": dict(max_position_embeddings=131072, num_key_value_heads=8, sliding_window=4096)}


def preset(
    layers: int, heads: int, kv_heads: int, hidden: int, intermediate: int, vocab: int = 32000, **fields: Any
) -> dict[str, Any]:
    """Return the fields of config.json of a published size; `fields` add to the common ones or replace them."""
    return dict(
        model_type="llama", num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        hidden_size=hidden, intermediate_size=intermediate, vocab_size=vocab, max_position_embeddings=2048,
        rms_norm_eps=1e-6,
    ) | fields  # fmt: skip


_LLAMA_2: dict[str, Any] = dict(max_position_embeddings=4096, rms_norm_eps=1e-5)
_LLAMA_3: dict[str, Any] = dict(vocab=128256, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=500000.0)
_SCALING: dict[str, Any] = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8192)  # fmt: skip
_LLAMA_3_1: dict[str, Any] = dict(_LLAMA_3, max_position_embeddings=131072, rope_scaling=_SCALING)
_LLAMA_3_2: dict[str, Any] = dict(_LLAMA_3_1, rope_scaling=dict(_SCALING, factor=32.0), tie_word_embeddings=True)
_CODE: dict[str, Any] = dict(max_position_embeddings=16384, rms_norm_eps=1e-5, rope_theta=1e6)
_MISTRAL: dict[str, Any] = dict(model_type="mistral", max_position_embeddings=32768, rms_norm_eps=1e-5)
_NEMO: dict[str, Any] = dict(_MISTRAL, head_dim=128, rope_theta=1e6, sliding_window=None)
_FALCON_3: dict[str, Any] = dict(vocab=131072, head_dim=256, max_position_embeddings=32768, rope_theta=1000042.0)
_SMOL: dict[str, Any] = dict(vocab=49152, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=100000.0,
             tie_word_embeddings=True)  # fmt: skip
PRESETS = {
    "llama-7b": preset(32, 32, 32, 4096, 11008),
    "llama-13b": preset(40, 40, 40, 5120, 13824),
    "llama-30b": preset(60, 52, 52, 6656, 17920),
    "llama-65b": preset(80, 64, 64, 8192, 22016),
    "Llama-2-7b": preset(32, 32, 32, 4096, 11008, **_LLAMA_2),
    "Llama-2-13b": preset(40, 40, 40, 5120, 13824, **_LLAMA_2),
    "Llama-2-70b": preset(80, 64, 8, 8192, 28672, **_LLAMA_2),
    "Llama-3-8B": preset(32, 32, 8, 4096, 14336, **_LLAMA_3),
    "Llama-3-70B": preset(80, 64, 8, 8192, 28672, **_LLAMA_3),
    "Llama-3.1-8B": preset(32, 32, 8, 4096, 14336, **_LLAMA_3_1),
    "Llama-3.1-70B": preset(80, 64, 8, 8192, 28672, **_LLAMA_3_1),
    "Llama-3.2-1B": preset(16, 32, 8, 2048, 8192, **_LLAMA_3_2, head_dim=64),
    "Llama-3.2-3B": preset(28, 24, 8, 3072, 8192, **_LLAMA_3_2, head_dim=128),
    "CodeLlama-7b": preset(32, 32, 32, 4096, 11008, 32016, **_CODE),
    "CodeLlama-13b": preset(40, 40, 40, 5120, 13824, 32016, **_CODE),
    "CodeLlama-34b": preset(48, 64, 8, 8192, 22016, **_CODE),
    "vicuna-7b-v1.5": preset(32, 32, 32, 4096, 11008, **_LLAMA_2),
    "vicuna-13b-v1.5": preset(40, 40, 40, 5120, 13824, **_LLAMA_2),
    "open_llama_3b": preset(26, 32, 32, 3200, 8640),
    "open_llama_7b": preset(32, 32, 32, 4096, 11008),
    "open_llama_13b": preset(40, 40, 40, 5120, 13824),
    "Falcon3-1B-Base": preset(18, 8, 4, 2048, 8192, **_FALCON_3),
    "Falcon3-3B-Base": preset(22, 12, 4, 3072, 9216, **_FALCON_3),
    "Falcon3-7B-Base": preset(28, 12, 4, 3072, 23040, **_FALCON_3),
    "Falcon3-10B-Base": preset(40, 12, 4, 3072, 23040, **_FALCON_3),
    "TinyLlama-1.1B": preset(22, 32, 4, 2048, 5632, rms_norm_eps=1e-5),
    "Mistral-7B-v0.1": preset(32, 32, 8, 4096, 14336, **_MISTRAL, sliding_window=4096),
    "Mistral-7B-v0.3": preset(32, 32, 8, 4096, 14336, 32768, **_MISTRAL, rope_theta=1e6, sliding_window=None),
    "Mistral-Nemo-Base-2407": preset(40, 32, 8, 5120, 14336, 131072, **_NEMO),
    "Mistral-Small-24B-Base-2501": preset(40, 32, 8, 5120, 32768, 131072, **_NEMO | dict(rope_theta=1e8)),
    "SmolLM2-135M": preset(30, 9, 3, 576, 1536, **_SMOL),
    "SmolLM2-360M": preset(32, 15, 5, 960, 2560, **_SMOL),
    "SmolLM2-1.7B": preset(24, 32, 32, 2048, 8192, **dict(_SMOL, rope_theta=130000.0)),
}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    attention_bias, mlp_bias = hf.get("attention_bias", False), hf.get("mlp_bias", False)
    window = hf.get("sliding_window") if hf["model_type"] == "mistral" else None  # no Llama has one
    return {
        **sizes(hf),
        "n_query_groups": hf.get("num_key_value_heads") or hf["num_attention_heads"],
        "head_size": hf.get("head_dim") or 0,
        "sliding_window": window,
        "norm_class": "RMSNorm",
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "mlp_class": "SwiGLU",
        "activation": activation(hf.get("hidden_act", "silu")),
        "intermediate_size": hf["intermediate_size"],
        "bias": mlp_bias,
        "qkv_bias": attention_bias,
        "proj_bias": attention_bias,
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        **rope(hf),
    }


def weights(config: Config) -> Table:
    layer = "model.layers.{}."
    return {
        "wte": "model.embed_tokens",
        "h.{}.norm_1": layer + "input_layernorm",
        "h.{}.norm_2": layer + "post_attention_layernorm",
        "h.{}.attn.qkv": Stacked(tuple(f"{layer}self_attn.{x}_proj" for x in "qkv"), config.qkv_sizes),
        "h.{}.attn.proj": layer + "self_attn.o_proj",
        "h.{}.mlp.gate_up": Stacked((layer + "mlp.gate_proj", layer + "mlp.up_proj"), (config.intermediate_size,) * 2),
        "h.{}.mlp.proj": layer + "mlp.down_proj",
        "ln_f": "model.norm",
        "lm_head": "lm_head",
    }


def turned_qkv(config: Config) -> Table:
    """Return the place of queries, keys and values whose rotated pairs are neighbors in the file."""
    modules = tuple(f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkv")
    return {"h.{}.attn.qkv": Turned(modules, config.qkv_sizes, neighbors_apart(config.rope_n_elem, config.head_size))}


ARCHITECTURES = ("llama",)


def gguf(config: Config) -> Layout:
    unread = "takes no biases over" if config.bias or config.qkv_bias else ""
    return Layout("llama", interleaved=True, unread=unread)


def from_gguf(said: Said) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import LlamaConfig, MistralConfig

    size = tiny_size(**fields)
    llama3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 32}  # fmt: skip
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    return {
        "llama": LlamaConfig(**size),
        "llama3": LlamaConfig(**size, num_key_value_heads=2, rope_parameters=llama3),
        "codellama": LlamaConfig(**size, num_key_value_heads=4, rope_parameters={"rope_theta": 1e6}),
        "linear": LlamaConfig(**size, num_key_value_heads=1, rope_parameters=linear),
        "yarn": LlamaConfig(**size, num_key_value_heads=2, rope_parameters=yarn),
        "biased": LlamaConfig(**size, attention_bias=True, mlp_bias=True, head_dim=32),
        "smollm2": LlamaConfig(**size, num_key_value_heads=2, tie_word_embeddings=True),
        "mistral": MistralConfig(**size, num_key_value_heads=2, sliding_window=5),
    }
