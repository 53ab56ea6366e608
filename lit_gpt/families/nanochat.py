"""nanochat (Karpathy 2025): norms without weights, of the embedding too, queries and keys rotated the other way round,
the square of a ReLU, and capped logits."""

from functools import partial
from typing import Any

from lit_gpt.families import llama
from lit_gpt.families.fields import activation, tiny_size
from lit_gpt.families.tables import Table, Turned
from lit_gpt.model.config import Config

MODEL_TYPES = ("nanochat",)

_preset = partial(llama.preset, model_type="nanochat", vocab=65536, final_logit_softcapping=15.0)
PRESETS = {
    "nanochat-d20": _preset(20, 10, 10, 1280, 5120),
    "nanochat-d32": _preset(32, 16, 16, 2048, 8192),
}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    return llama.config(hf) | {
        "norm_class": "PlainRMSNorm",
        "qk_norm": "head",
        "embedding_norm": True,
        "mlp_class": "GptNeoxMLP",
        "activation": activation(hf.get("hidden_act", "relu2")),
        "logit_softcap": hf.get("final_logit_softcapping", 15.0),
    }


def weights(config: Config) -> Table:
    mlp, half = "model.layers.{}.mlp.", config.head_size // 2
    qkv = tuple(f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkv")
    other_way = (*range(half, 2 * half), *range(half))  # the halves of a head, exchanged, turn the other way round
    return {
        **llama.weights(config),
        "h.{}.attn.qkv": Turned(qkv, config.qkv_sizes, other_way),
        "h.{}.mlp.fc": mlp + "fc1",
        "h.{}.mlp.proj": mlp + "fc2",
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import NanoChatConfig

    own: dict[str, Any] = dict(num_key_value_heads=2, pad_token_id=None)
    return {"nanochat": NanoChatConfig(**tiny_size(**own | fields))}
