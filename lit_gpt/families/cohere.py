"""Command R and Aya (Cohere 2024): attention and MLP side by side behind one norm, rotated pairs that are neighbors,
and a factor on logits; Command R7B (Cohere 2): a window in three layers of four, and no positions in the fourth."""

from functools import partial
from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families import llama
from lit_gpt.families.fields import rope, tiny_size, windows
from lit_gpt.families.tables import Layout, Said, Table, TurnedNorms, neighbors_apart
from lit_gpt.model.config import Config

MODEL_TYPES = ("cohere", "cohere2")
# What transformers takes for fields that a config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cohere": dict(max_position_embeddings=8192),
    "cohere2": dict(max_position_embeddings=8192),
}

_preset = partial(llama.preset, vocab=256000, max_position_embeddings=8192, logit_scale=0.0625, layer_norm_eps=1e-5,
                  tie_word_embeddings=True)  # fmt: skip
_1: dict[str, Any] = dict(model_type="cohere", rope_theta=10000.0)
PRESETS = {
    "c4ai-command-r-v01": _preset(40, 64, 64, 8192, 22528, **_1 | dict(rope_theta=8e6, max_position_embeddings=131072)),
    "aya-23-8B": _preset(32, 32, 8, 4096, 14336, **_1),
    "c4ai-command-r7b-12-2024": _preset(32, 32, 8, 4096, 14336, model_type="cohere2", logit_scale=0.25,
                                        rope_theta=50000.0, sliding_window=4096),
}  # fmt: skip


def config(hf: dict[str, Any]) -> dict[str, Any]:
    second, layers = hf["model_type"] == "cohere2", range(hf["num_hidden_layers"])
    own: dict[str, Any] = {
        "qk_norm": "heads" if hf.get("use_qk_norm") else None,
        "parallel_residual": True,
        "shared_attention_norm": True,
        "norm_class": "BiaslessLayerNorm",
        "norm_eps": hf.get("layer_norm_eps", 1e-5),
        "bias": False,
        "logit_divisor": 1 / hf.get("logit_scale", 0.0625),
        "tie_embeddings": hf.get("tie_word_embeddings", True),
        **rope(hf if second else {"rope_theta": 500000.0} | hf),
    }
    if second:
        period = hf.get("sliding_window_pattern", 4)
        kinds = ["sliding_attention" if (layer + 1) % period else "full_attention" for layer in layers]
        own |= windows({"sliding_window": 4096} | hf, kinds)
        own["unrotated_layers"] = own.get("global_layers", list(layers))
    return llama.config(hf) | own


def weights(config: Config) -> Table:
    attention, order = "model.layers.{}.self_attn.", neighbors_apart(config.rope_n_elem, config.head_size)
    return {
        **llama.weights(config),
        **llama.turned_qkv(config),
        "h.{}.attn.qk_norm.q": TurnedNorms((attention + "q_norm",), order),
        "h.{}.attn.qk_norm.k": TurnedNorms((attention + "k_norm",), order),
    }


ARCHITECTURES = ("command-r", "cohere2")


def gguf(config: Config) -> Layout:
    scale: dict[str, Any] = {"logit_scale": 1 / config.logit_divisor}
    if not config.tie_embeddings:
        raise UserError("--format gguf: llama.cpp's command-r and cohere2 tie their heads")
    if config.qk_norm and config.n_layer < 64:
        raise UserError("--format gguf: llama.cpp's command-r norms queries and keys from 64 layers on alone")
    if not config.unrotated_layers:
        norms = {
            f"h.{{}}.attn.qk_norm.{x}": TurnedNorms(
                (f"blk.{{}}.attn_{x}_norm",), neighbors_apart(config.rope_n_elem, config.head_size)
            )
            for x in "qk"
        }
        return Layout("command-r", interleaved=True, metadata=scale, places=norms)
    if config.global_layers != [layer for layer in range(config.n_layer) if (layer + 1) % 4 == 0]:
        raise UserError("--format gguf: llama.cpp's cohere2 has a window in all layers but every fourth")
    scale["attention.sliding_window"] = config.sliding_window
    return Layout("cohere2", interleaved=True, keeps_window=True, metadata=scale)


def from_gguf(said: Said) -> dict[str, Any]:
    common = {
        "logit_scale": said.need("logit_scale", float),
        "layer_norm_eps": said.need("attention.layer_norm_epsilon", float),
        "tie_word_embeddings": True,
    }
    if said.architecture == "command-r":
        normed = said.holds("blk.0.attn_q_norm.weight")
        return common | {"architectures": ["CohereForCausalLM"], "model_type": "cohere", "use_qk_norm": normed}
    layers, window = said.need("block_count", int), said.need("attention.sliding_window", int)
    kinds = ["sliding_attention" if (layer + 1) % 4 else "full_attention" for layer in range(layers)]
    own = {"architectures": ["Cohere2ForCausalLM"], "model_type": "cohere2"}
    return common | own | {"sliding_window": window, "layer_types": kinds}


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import Cohere2Config, CohereConfig

    size = tiny_size(**dict(num_key_value_heads=2, pad_token_id=None, bos_token_id=1, eos_token_id=2) | fields)
    return {
        "cohere": CohereConfig(**size, logit_scale=0.3),
        "qk-norm": CohereConfig(**size, use_qk_norm=True),
        "cohere2": Cohere2Config(**size, sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
    }
