"""Arcee's AFM (Arcee AI 2025): Llama with a plain MLP and the square of a ReLU."""

from typing import Any

from lit_gpt.families import llama
from lit_gpt.families.fields import activation, tiny_size
from lit_gpt.families.tables import Layout, Said, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("arcee",)
# What transformers takes for fields that a config.json leaves out.
DEFAULTS = {"arcee": dict(max_position_embeddings=4096)}

PRESETS: dict[str, dict[str, Any]] = {}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    plain = {"mlp_class": "GptNeoxMLP", "activation": activation(hf.get("hidden_act", "relu2"))}
    return llama.config({"rms_norm_eps": 1e-5} | hf) | plain


def weights(config: Config) -> Table:
    mlp = "model.layers.{}.mlp."
    return {**llama.weights(config), "h.{}.mlp.fc": mlp + "up_proj", "h.{}.mlp.proj": mlp + "down_proj"}


ARCHITECTURES = ("arcee",)


def gguf(config: Config) -> Layout:
    return Layout("arcee", ("relu2",), interleaved=True)


def from_gguf(said: Said) -> dict[str, Any]:
    return {"architectures": ["ArceeForCausalLM"], "model_type": "arcee", "hidden_act": "relu2"}


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import ArceeConfig

    own: dict[str, Any] = dict(num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
    return {"arcee": ArceeConfig(**tiny_size(**own | fields))}
