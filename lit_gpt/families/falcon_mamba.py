"""Falcon-Mamba (Zuo et al. 2024): Mamba with norms of keys, queries and time steps, in every layer and nothing else."""

import math
from typing import Any

from lit_gpt.families.fields import refuse
from lit_gpt.families.tables import Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("falcon_mamba",)

_7B: dict[str, Any] = dict(
    model_type="falcon_mamba", num_hidden_layers=64, hidden_size=4096, vocab_size=65024, state_size=16, expand=2,
    time_step_rank=256, tie_word_embeddings=False,
)  # fmt: skip
PRESETS = {"falcon-mamba-7b": _7B, "falcon-mamba-7b-instruct": _7B}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    refuse(hf, use_bias=False, hidden_act="silu")
    layers, n, rank = hf["num_hidden_layers"], hf["hidden_size"], hf.get("time_step_rank", "auto")
    return {
        "n_layer": layers,
        "n_head": 1,
        "n_embd": n,
        "vocab_size": hf["vocab_size"],
        "block_size": hf.get("max_position_embeddings", 8192),  # what it was trained on; no field tells
        "rotary_percentage": 0.0,
        "mixers": ["mamba"] * layers,
        "conv_size": hf.get("conv_kernel", 4),
        "conv_bias": hf.get("use_conv_bias", True),
        "state_heads": int(hf.get("expand", 2) * n),
        "state_size": hf.get("state_size", 16),
        "state_norm_eps": hf.get("mixer_rms_eps", 1e-6),
        "step_rank": math.ceil(n / 16) if rank == "auto" else rank,
        "norm_class": "RMSNorm",
        "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        "mlp_class": "",
        "tie_embeddings": hf.get("tie_word_embeddings", True),
    }


def weights(config: Config) -> Table:
    mixer = "backbone.layers.{}.mixer"
    return {
        "wte": "backbone.embeddings",
        "h.{}.norm_1": "backbone.layers.{}.norm",
        "h.{}.mixer": mixer,
        "h.{}.mixer.qkv": mixer + ".in_proj",
        "h.{}.mixer.conv": mixer + ".conv1d",
        "h.{}.mixer.x_proj": mixer + ".x_proj",
        "h.{}.mixer.dt_proj": mixer + ".dt_proj",
        "h.{}.mixer.proj": mixer + ".out_proj",
        "ln_f": "backbone.norm_f",
        "lm_head": "lm_head",
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import FalconMambaConfig

    size: dict[str, Any] = dict(vocab_size=96, hidden_size=64, num_hidden_layers=2, state_size=8, pad_token_id=None)
    return {"falcon_mamba": FalconMambaConfig(**size | fields)}
