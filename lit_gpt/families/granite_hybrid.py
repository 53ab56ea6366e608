"""Granite 4 hybrid (Granite Team 2025): Granite with Mamba-2 in most layers, without positions; its larger sizes have
experts beside the MLP, which all tokens go through."""

from dataclasses import replace
from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families import granite, granite_moe, llama
from lit_gpt.families.fields import refuse, tiny_size
from lit_gpt.families.tables import (
    Decay,
    Layout,
    Named,
    PerHead,
    Place,
    Said,
    Squeezed,
    Table,
    Unsqueezed,
    chained,
)
from lit_gpt.model.config import Config

MODEL_TYPES = ("granitemoehybrid",)

_FACTORS: dict[str, Any] = dict(
    embedding_multiplier=12.0, attention_multiplier=0.015625, logits_scaling=8.0, residual_multiplier=0.22
)
_LAYERS = ["attention" if i % 10 == 5 else "mamba" for i in range(40)]
PRESETS = {
    "granite-4.0-h-micro": llama.preset(
        40, 32, 8, 2048, 8192, 100352, model_type="granitemoehybrid", shared_intermediate_size=8192, rms_norm_eps=1e-5,
        max_position_embeddings=131072, num_local_experts=0, tie_word_embeddings=True, mamba_n_heads=64,
        mamba_d_head=64, mamba_d_state=128,
        layer_types=_LAYERS, **_FACTORS,
    ),
    "granite-4.0-h-tiny": llama.preset(
        40, 12, 4, 1536, 512, 100352, model_type="granitemoehybrid", shared_intermediate_size=1024, rms_norm_eps=1e-5,
        max_position_embeddings=131072, num_local_experts=64, num_experts_per_tok=6, tie_word_embeddings=True,
        mamba_n_heads=48, mamba_d_head=64, mamba_d_state=128, layer_types=_LAYERS,
        **dict(_FACTORS, attention_multiplier=0.0078125, logits_scaling=6.0),
    ),
}  # fmt: skip

MIXERS = {"mamba": "mamba2", "linear_attention": "mamba2", "attention": "attention", "full_attention": "attention"}
UNLIMITED: tuple[Any, ...] = (float("inf"), {"__float__": "Infinity"}, "Infinity")


def config(hf: dict[str, Any]) -> dict[str, Any]:
    refuse(hf, attention_bias=False, hidden_act="silu", mamba_n_groups=1, mamba_proj_bias=False)
    refuse_step_limit(hf)
    kinds = hf.get("layer_types") or hf.get("layers_block_type") or ["mamba"] * hf["num_hidden_layers"]
    if unknown := sorted(set(kinds) - set(MIXERS)):
        raise UserError(f"config.json: layer_types {unknown} are not supported; expected {sorted(MIXERS)}")
    heads = hf.get("mamba_n_heads", 128)
    size = hf.get("mamba_d_head", "auto")
    shared = hf.get("shared_intermediate_size", 1024)
    mlp = {"intermediate_size": shared}
    if hf.get("num_local_experts", 8):
        mlp = {**granite_moe.experts(hf), "shared_intermediate_size": shared}
    return granite.config(hf) | {
        **mlp,
        "unrotated_layers": [] if hf.get("position_embedding_type") == "rope" else list(range(len(kinds))),
        "mixers": [MIXERS[kind] for kind in kinds],
        "conv_size": hf.get("mamba_d_conv", 4),
        "conv_bias": hf.get("mamba_conv_bias", True),
        "state_heads": heads,
        "state_head_size": hf.get("mamba_expand", 2) * hf["hidden_size"] // heads if size == "auto" else size,
        "state_groups": 1,
        "state_size": hf.get("mamba_d_state", 256),
    }


def refuse_step_limit(hf: dict[str, Any]) -> None:
    low, high = hf.get("time_step_limit") or (0.0, float("inf"))
    if low != 0 or high not in UNLIMITED:
        raise UserError(f"config.json: 'time_step_limit': {[low, high]} is not supported; expected [0, Infinity]")


def weights(config: Config) -> Table:
    mixer, shared = "model.layers.{}.mamba", "h.{}.mlp." + ("shared." if config.n_expert else "")
    return {
        **(granite_moe if config.n_expert else llama).weights(config),
        "h.{}.mixer": mixer,
        "h.{}.mixer.qkv": mixer + ".in_proj",
        "h.{}.mixer.conv": mixer + ".conv1d",
        "h.{}.mixer.norm": mixer + ".norm",
        "h.{}.mixer.proj": mixer + ".out_proj",
        shared + "gate_up": "model.layers.{}.shared_mlp.input_linear",
        shared + "proj": "model.layers.{}.shared_mlp.output_linear",
    }


ARCHITECTURES = ("granitehybrid",)


def gguf(config: Config) -> Layout:
    if not config.conv_bias or config.unrotated_layers not in ([], list(range(config.n_layer))):
        raise UserError(
            "--format gguf: llama.cpp's granitehybrid has convolutions with biases, and rotates all or none"
        )
    own = {
        "rope.scaling.finetuned": not config.unrotated_layers,
        "expert_shared_feed_forward_length": config.shared_intermediate_size or config.intermediate_size,
        **mamba2_metadata(config),
    }
    common = granite.gguf(config)
    return replace(common, architecture="granitehybrid", metadata=common.metadata | own, places=mamba2_places(config))


def mamba2_metadata(config: Config) -> dict[str, Any]:
    """Return what the metadata of a GGUF file says about Mamba-2."""
    return {
        "ssm.conv_kernel": config.conv_size,
        "ssm.inner_size": config.state_heads * config.state_head_size,
        "ssm.state_size": config.state_size,
        "ssm.time_step_rank": config.state_heads,
        "ssm.group_count": config.state_groups,
    }


def mamba2_places(config: Config, ours: str = "h.{}.", block: str = "blk.{}.") -> dict[str, str | Place]:
    """Return where the tensors of Mamba-2 lie in a GGUF file."""
    mixer, ssm, values = ours + "mixer", block + "ssm_", config.state_heads * config.state_head_size
    return {
        mixer + ".qkv": ssm + "in",
        mixer + ".conv.weight": Squeezed((ssm + "conv1d",), 1),
        mixer + ".conv.bias": ssm + "conv1d",
        mixer + ".A_log": chained(Decay(()), Unsqueezed((ssm + "a",), 1)),
        mixer + ".D": Unsqueezed((ssm + "d",), 1),
        mixer + ".dt_bias": Named((ssm + "dt.bias",)),
        mixer + ".norm": PerHead((ssm + "norm",), values // config.state_groups),
        mixer + ".proj": ssm + "out",
    }


def from_gguf(said: Said) -> dict[str, Any]:
    kinds = ["attention" if heads else "mamba" for heads in said.each("attention.head_count_kv", int)]
    heads, values = said.need("ssm.time_step_rank", int), said.need("ssm.inner_size", int)
    size = said.need("feed_forward_length", int)
    return {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "layer_types": kinds,
        "position_embedding_type": "rope" if said.get("rope.scaling.finetuned", bool, True) else "nope",
        "num_local_experts": said.get("expert_count", int, 0),
        "num_experts_per_tok": said.get("expert_used_count", int, 0),
        "shared_intermediate_size": said.get("expert_shared_feed_forward_length", int) or size,
        "mamba_n_heads": heads,
        "mamba_d_head": values // heads,
        "mamba_expand": values // said.need("embedding_length", int),
        "mamba_d_state": said.need("ssm.state_size", int),
        "mamba_d_conv": said.need("ssm.conv_kernel", int),
        "mamba_n_groups": said.need("ssm.group_count", int),
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        **granite.multipliers(said),
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import GraniteMoeHybridConfig

    own: dict[str, Any] = dict(
        num_key_value_heads=2, num_local_experts=0, shared_intermediate_size=112, mamba_n_heads=8, mamba_d_head=16,
        mamba_d_state=8, embedding_multiplier=3.0, attention_multiplier=0.125, residual_multiplier=0.4,
        logits_scaling=2.0, layer_types=["mamba", "attention"],
    )  # fmt: skip
    size = tiny_size(**own | fields)
    return {
        "granite_hybrid-rope": GraniteMoeHybridConfig(**size, position_embedding_type="rope"),
        "granite_hybrid-experts": GraniteMoeHybridConfig(
            **size | dict(intermediate_size=24, num_local_experts=5, num_experts_per_tok=2)
        ),
        "granite_hybrid": GraniteMoeHybridConfig(**size, tie_word_embeddings=True),
    }
