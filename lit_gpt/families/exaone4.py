"""EXAONE 4 (LG AI Research 2025): norms behind attention and MLP instead of before them, and of each query and key; in
the larger ones, three layers of four have a window, and those without have no positions."""

from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families import llama, olmo2
from lit_gpt.families.fields import tiny_size, windows
from lit_gpt.families.tables import Layout, Said
from lit_gpt.model.config import Config

MODEL_TYPES = ("exaone4",)
# What transformers takes for fields that a config.json leaves out.
DEFAULTS = {"exaone4": dict(num_key_value_heads=32)}

_SCALING: dict[str, Any] = dict(rope_type="llama3", factor=16.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8192)  # fmt: skip
PRESETS = {
    "EXAONE-4.0-1.2B": llama.preset(
        30, 32, 8, 2048, 4096, 102400, model_type="exaone4", head_dim=64, max_position_embeddings=65536,
        rms_norm_eps=1e-5, rope_theta=1e6, rope_scaling=_SCALING, sliding_window=None, tie_word_embeddings=True,
        layer_types=["full_attention"] * 30,
    ),
}  # fmt: skip


def config(hf: dict[str, Any]) -> dict[str, Any]:
    layers = range(hf["num_hidden_layers"])
    window, period = hf.get("sliding_window", 4096), hf.get("sliding_window_pattern", 4)
    if isinstance(period, str):  # such as "LLLG"
        period = len(period)
    kinds = [
        "sliding_attention" if window is not None and period and (layer + 1) % period else "full_attention"
        for layer in layers
    ]
    found = windows({"sliding_window": 4096} | hf, kinds)
    unrotated = found.get("global_layers", list(layers)) if window is not None else []
    own = {"qk_norm": "head", "pre_norm": False, "post_norm": True, "unrotated_layers": unrotated}
    return llama.config({"rms_norm_eps": 1e-5} | hf) | own | found


weights = olmo2.weights


ARCHITECTURES = ("exaone4",)


def gguf(config: Config) -> Layout:
    every = [layer for layer in range(config.n_layer) if (layer + 1) % 4 == 0]
    if config.sliding_window and (config.n_layer != 64 or config.global_layers != every):
        raise UserError("--format gguf: llama.cpp's exaone4 has windows with 64 layers alone, but in every fourth")
    if config.unrotated_layers != (every if config.sliding_window else []):
        raise UserError("--format gguf: llama.cpp's exaone4 rotates layers with a window, and all where there is none")
    if config.n_head * config.head_size != config.n_embd:
        raise UserError("--format gguf: llama.cpp's exaone4 has heads whose sizes sum to the embedding's")
    window = {"attention.sliding_window": config.sliding_window}
    return Layout("exaone4", keeps_window=True, metadata=window)


def from_gguf(said: Said) -> dict[str, Any]:
    window = said.get("attention.sliding_window", int) or None
    return {
        "architectures": ["Exaone4ForCausalLM"],
        "model_type": "exaone4",
        "sliding_window": window,
        "sliding_window_pattern": 4 if window else None,
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import Exaone4Config

    size = tiny_size(**dict(num_key_value_heads=2, head_dim=24) | fields)
    return {
        "1.2b": Exaone4Config(
            **size, sliding_window=None, layer_types=["full_attention"] * 2, tie_word_embeddings=True
        ),
        "32b": Exaone4Config(**size, sliding_window=5, sliding_window_pattern=2),
    }
