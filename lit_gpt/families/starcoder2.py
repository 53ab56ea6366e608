"""StarCoder 2 (Lozhkov et al. 2024): Llama's attention with a window, a plain MLP, LayerNorm and biases everywhere."""

from functools import partial
from typing import Any

from lit_gpt.families import llama
from lit_gpt.families.fields import activation, tiny_size
from lit_gpt.families.tables import Layout, Said, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("starcoder2",)
# What transformers takes for fields that a config.json leaves out.
DEFAULTS = {"starcoder2": dict(max_position_embeddings=4096, num_key_value_heads=2)}

_preset = partial(llama.preset, model_type="starcoder2", vocab=49152, max_position_embeddings=16384, use_bias=True,
                  sliding_window=4096)  # fmt: skip
PRESETS = {
    "starcoder2-3b": _preset(30, 24, 2, 3072, 12288, rope_theta=999999.4420358813, tie_word_embeddings=True),
    "starcoder2-7b": _preset(32, 36, 4, 4608, 18432, rope_theta=1e6, tie_word_embeddings=True),
    "starcoder2-15b": _preset(40, 48, 4, 6144, 24576, rope_theta=1e5, tie_word_embeddings=False),
}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    return llama.config(hf) | {
        "sliding_window": hf.get("sliding_window"),
        "norm_class": "LayerNorm",
        "norm_eps": hf.get("norm_epsilon", 1e-5),
        "mlp_class": "GptNeoxMLP",
        "activation": activation(hf.get("hidden_act", "gelu_pytorch_tanh")),
        **dict.fromkeys(("bias", "qkv_bias", "proj_bias"), hf.get("use_bias", True)),
        "tie_embeddings": hf.get("tie_word_embeddings", True),
    }


def weights(config: Config) -> Table:
    mlp = "model.layers.{}.mlp."
    return {**llama.weights(config), "h.{}.mlp.fc": mlp + "c_fc", "h.{}.mlp.proj": mlp + "c_proj"}


ARCHITECTURES = ("starcoder2",)


def gguf(config: Config) -> Layout:
    return Layout("starcoder2", ("gelu_tanh",), unread="")


def from_gguf(said: Said) -> dict[str, Any]:
    return {
        "architectures": ["Starcoder2ForCausalLM"],
        "model_type": "starcoder2",
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": said.need("attention.layer_norm_epsilon", float),
        "use_bias": said.holds("blk.0.attn_q.bias"),
        "sliding_window": None,
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import Starcoder2Config

    own: dict[str, Any] = dict(num_key_value_heads=2, bos_token_id=1, eos_token_id=2, sliding_window=5)
    return {"starcoder2": Starcoder2Config(**tiny_size(**own | fields))}
