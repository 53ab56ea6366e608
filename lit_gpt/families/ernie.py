"""ERNIE 4.5 without experts (Baidu 2025): Llama, whose rotated pairs are neighbors."""

from typing import Any

from lit_gpt.families import llama
from lit_gpt.families.fields import rope, tiny_size
from lit_gpt.families.tables import Layout, Said, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("ernie4_5",)
# What transformers takes for fields that a config.json leaves out.
DEFAULTS = {"ernie4_5": dict(max_position_embeddings=131072, num_key_value_heads=2)}

_0_3B: dict[str, Any] = llama.preset(
    18, 16, 2, 1024, 3072, 103424, model_type="ernie4_5", head_dim=128, max_position_embeddings=131072,
    rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=True,
)  # fmt: skip
PRESETS = {"ERNIE-4.5-0.3B-PT": _0_3B, "ERNIE-4.5-0.3B-Base-PT": _0_3B}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    bias = hf.get("use_bias", False)
    return llama.config({"head_dim": 128, "rms_norm_eps": 1e-5} | hf) | {
        **dict.fromkeys(("bias", "qkv_bias", "proj_bias"), bias),
        "tie_embeddings": hf.get("tie_word_embeddings", True),
        **rope({"rope_theta": 500000.0} | hf),
    }


def weights(config: Config) -> Table:
    return {**llama.weights(config), **llama.turned_qkv(config)}


ARCHITECTURES = ("ernie4_5",)


def gguf(config: Config) -> Layout:
    return Layout("ernie4_5", interleaved=True)


def from_gguf(said: Said) -> dict[str, Any]:
    biased = said.holds("blk.0.attn_q.bias")
    return {"architectures": ["Ernie4_5ForCausalLM"], "model_type": "ernie4_5", "use_bias": biased}


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import Ernie4_5Config

    own: dict[str, Any] = dict(num_key_value_heads=2, head_dim=24, pad_token_id=None)
    return {"ernie4_5": Ernie4_5Config(**tiny_size(**own | fields))}
