"""Qwen 2 and 2.5 (Qwen Team 2024): Llama with biases of query, key and value; Qwen 3 (2025): with norms of query and
key in their place, and heads whose size the width does not tell."""

from typing import Any

from lit_gpt.families import llama
from lit_gpt.families.fields import tiny_size, windows
from lit_gpt.families.tables import Layout, Said, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("qwen2", "qwen3")
# What transformers takes for fields that a config.json leaves out.
_SIZES = dict(max_position_embeddings=32768, num_key_value_heads=32, sliding_window=4096)
DEFAULTS = {"qwen2": _SIZES, "qwen3": dict(_SIZES, head_dim=128)}

_SMALL: dict[str, Any] = dict(model_type="qwen2", vocab=151936, rope_theta=1e6, max_position_embeddings=131072)
_SHORT: dict[str, Any] = dict(_SMALL, max_position_embeddings=32768)
_LARGE: dict[str, Any] = dict(_SMALL, vocab=152064)
_QWEN_2_5: dict[str, Any] = dict(_LARGE, rms_norm_eps=1e-5)
_QWEN_3: dict[str, Any] = dict(_SMALL, model_type="qwen3", max_position_embeddings=40960, head_dim=128)
_TIED: dict[str, Any] = dict(tie_word_embeddings=True)
PRESETS = {
    "Qwen2-0.5B": llama.preset(24, 14, 2, 896, 4864, **_SMALL, **_TIED),
    "Qwen2-1.5B": llama.preset(28, 12, 2, 1536, 8960, **_SMALL, **_TIED),
    "Qwen2-7B": llama.preset(28, 28, 4, 3584, 18944, **_LARGE),
    "Qwen2.5-0.5B": llama.preset(24, 14, 2, 896, 4864, **_SHORT, **_TIED),
    "Qwen2.5-1.5B": llama.preset(28, 12, 2, 1536, 8960, **_SMALL, **_TIED),
    "Qwen2.5-3B": llama.preset(36, 16, 2, 2048, 11008, **_SHORT, **_TIED),
    "Qwen2.5-7B": llama.preset(28, 28, 4, 3584, 18944, **_LARGE),
    "Qwen2.5-14B": llama.preset(48, 40, 8, 5120, 13824, **_QWEN_2_5),
    "Qwen2.5-32B": llama.preset(64, 40, 8, 5120, 27648, **_QWEN_2_5),
    "Qwen2.5-72B": llama.preset(80, 64, 8, 8192, 29568, **_QWEN_2_5),
    "Qwen3-0.6B": llama.preset(28, 16, 8, 1024, 3072, **_QWEN_3, **_TIED),
    "Qwen3-1.7B": llama.preset(28, 16, 8, 2048, 6144, **_QWEN_3, **_TIED),
    "Qwen3-4B": llama.preset(36, 32, 8, 2560, 9728, **_QWEN_3, **_TIED),
    "Qwen3-8B": llama.preset(36, 32, 8, 4096, 12288, **_QWEN_3),
    "Qwen3-14B": llama.preset(40, 40, 8, 5120, 17408, **_QWEN_3),
    "Qwen3-32B": llama.preset(64, 64, 8, 5120, 25600, **_QWEN_3),
}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    layers = hf["num_hidden_layers"]
    if not hf.get("use_sliding_window"):
        hf = hf | {"sliding_window": None}  # as transformers, whatever layer_types says
    first = hf.get("max_window_layers", 28) if hf.get("use_sliding_window") else layers
    kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    own = {"qk_norm": "head", "head_size": hf.get("head_dim") or 128}
    if hf["model_type"] == "qwen2":
        own = {"qkv_bias": True}
    return {**llama.config(hf), **windows(hf, kinds), **own}


def weights(config: Config) -> Table:
    attention = "model.layers.{}.self_attn."
    norms = {"h.{}.attn.qk_norm.q": attention + "q_norm", "h.{}.attn.qk_norm.k": attention + "k_norm"}
    return {**llama.weights(config), **norms}


ARCHITECTURES = ("qwen2", "qwen3")


def gguf(config: Config) -> Layout:
    if config.qkv_bias:
        return Layout("qwen2", unread="")
    return Layout("qwen3", unread="" if config.head_size == 128 else "takes the size of heads to be 128")


def from_gguf(said: Said) -> dict[str, Any]:
    name = "Qwen2" if said.architecture == "qwen2" else "Qwen3"
    own = {"architectures": [f"{name}ForCausalLM"], "model_type": said.architecture}
    return own | {"attention_bias": False}  # Qwen 2 has those that it has without saying


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import Qwen2Config, Qwen3Config

    size = tiny_size(**dict(num_key_value_heads=2) | fields)
    window: dict[str, Any] = dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)
    return {
        "qwen2": Qwen2Config(**size, **window),
        "qwen3": Qwen3Config(**size, head_dim=24, tie_word_embeddings=True),
    }
