"""OLMo 2 (OLMo Team 2024): norms behind attention and MLP instead of before them, and of the whole query and key."""

from typing import Any

from lit_gpt.families import llama, qwen
from lit_gpt.families.fields import tiny_size
from lit_gpt.families.tables import Layout, Said, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("olmo2",)

_OWN: dict[str, Any] = dict(model_type="olmo2", vocab=100352, max_position_embeddings=4096, rope_theta=500000.0)
PRESETS = {
    "OLMo-2-0425-1B": llama.preset(16, 16, 16, 2048, 8192, **_OWN),
    "OLMo-2-1124-7B": llama.preset(32, 32, 32, 4096, 11008, **_OWN),
    "OLMo-2-1124-13B": llama.preset(40, 40, 40, 5120, 13824, **_OWN),
    "OLMo-2-0325-32B": llama.preset(64, 40, 8, 5120, 27648, **_OWN),
}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    own = {"qk_norm": "projection", "pre_norm": False, "post_norm": True, "norm_eps": hf.get("rms_norm_eps", 1e-5)}
    return llama.config(hf) | own


def weights(config: Config) -> Table:
    layer = "model.layers.{}."
    return {
        **qwen.weights(config),
        "h.{}.post_norm_1": layer + "post_attention_layernorm",
        "h.{}.post_norm_2": layer + "post_feedforward_layernorm",
    }


ARCHITECTURES = ("olmo2",)


def gguf(config: Config) -> Layout:
    return Layout("olmo2")


def from_gguf(said: Said) -> dict[str, Any]:
    return {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import Olmo2Config

    size = tiny_size(**dict(num_key_value_heads=2, pad_token_id=None) | fields)
    return {"olmo2": Olmo2Config(**size)}
