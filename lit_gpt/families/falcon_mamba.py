"""Falcon-Mamba (Zuo et al. 2024): Mamba with norms of keys, queries and time steps, in every layer and nothing else."""

import math
from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families.fields import refuse
from lit_gpt.families.tables import Decay, Layout, Named, Place, Said, Squeezed, Table, chained
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


ARCHITECTURES = ("mamba",)


def gguf(config: Config) -> Layout:
    if config.state_heads != 2 * config.n_embd or not config.conv_bias:
        raise UserError("--format gguf: llama.cpp's mamba has twice as many channels, and convolutions with biases")
    if config.state_norm_eps != 1e-6:  # llama.cpp has norm_eps there, in Falcon-Mamba 7B too, and does not say it
        raise UserError("--format gguf: llama.cpp's mamba takes the epsilon of its inner norms for granted")
    mixer = "blk.{}.ssm_"
    places: dict[str, str | Place] = {
        "h.{}.mixer.qkv": mixer + "in",
        "h.{}.mixer.conv.weight": Squeezed((mixer + "conv1d",), 1),
        "h.{}.mixer.conv.bias": mixer + "conv1d",
        "h.{}.mixer.x_proj": mixer + "x",
        "h.{}.mixer.dt_proj": mixer + "dt",
        "h.{}.mixer.A_log": chained(Decay(()), Named((mixer + "a",))),
        "h.{}.mixer.D": Named((mixer + "d",)),
        "h.{}.mixer.proj": mixer + "out",
    }
    attention = ("head_count_kv", "key_length", "value_length")
    return Layout(
        "mamba",
        metadata={
            **dict.fromkeys([*(f"attention.{key}" for key in attention), "rope.dimension_count", "rope.freq_base"]),
            "attention.head_count": 0,
            "feed_forward_length": 0,
            "ssm.conv_kernel": config.conv_size,
            "ssm.inner_size": config.state_heads,
            "ssm.state_size": config.state_size,
            "ssm.time_step_rank": config.step_rank,
            "ssm.dt_b_c_rms": True,
        },
        places=places,
        unread="takes it for Mamba, which lacks the inner norms",
    )


def from_gguf(said: Said) -> dict[str, Any]:
    return {
        "architectures": ["FalconMambaForCausalLM"],
        "model_type": "falcon_mamba",
        "state_size": said.need("ssm.state_size", int),
        "conv_kernel": said.need("ssm.conv_kernel", int),
        "expand": 2,
        "intermediate_size": said.need("ssm.inner_size", int),  # for transformers, which has its channels by that name
        "time_step_rank": said.need("ssm.time_step_rank", int),
        "layer_norm_epsilon": said.need("attention.layer_norm_rms_epsilon", float),
        "use_bias": False,
        "use_conv_bias": True,
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import FalconMambaConfig

    size: dict[str, Any] = dict(vocab_size=96, hidden_size=64, num_hidden_layers=2, state_size=8, pad_token_id=None)
    return {"falcon_mamba": FalconMambaConfig(**size | fields)}
