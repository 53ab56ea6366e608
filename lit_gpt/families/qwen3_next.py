"""Qwen3-Next (Qwen Team 2025): three layers of gated delta nets, then one of attention whose output is gated; norms
whose weights are distances from 1; many small experts and one that all tokens go through."""

from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families import granite_hybrid, llama, mixtral, qwen
from lit_gpt.families.fields import refuse, rope, tiny_size
from lit_gpt.families.tables import (
    Decay,
    Interleaved,
    Layout,
    Named,
    Offset,
    Place,
    Said,
    Squeezed,
    Stacked,
    Table,
    chained,
)
from lit_gpt.model.config import Config

MODEL_TYPES = ("qwen3_next",)
# What transformers takes for fields that a config.json leaves out.
DEFAULTS = {"qwen3_next": dict(max_position_embeddings=32768, num_key_value_heads=2)}

_80B = llama.preset(
    48, 16, 2, 2048, 5120, 151936, model_type="qwen3_next", head_dim=256, max_position_embeddings=262144,
    rope_theta=1e7, partial_rotary_factor=0.25, num_experts=512, num_experts_per_tok=10, moe_intermediate_size=512,
    shared_expert_intermediate_size=512,
)  # fmt: skip
PRESETS = {"Qwen3-Next-80B-A3B-Instruct": _80B, "Qwen3-Next-80B-A3B-Thinking": _80B}

MIXERS = {"linear_attention": "gated_delta_net", "full_attention": "attention"}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    dense = {"mlp_only_layers": hf.get("mlp_only_layers") or []}
    refuse(hf | dense, decoder_sparse_step=1, mlp_only_layers=[])
    return hybrid(hf) | {
        "mlp_class": "MoE",
        "intermediate_size": hf.get("moe_intermediate_size", 512),
        "n_expert": hf.get("num_experts", 512),
        "n_expert_per_token": hf.get("num_experts_per_tok", 10),
        "norm_expert_weights": hf.get("norm_topk_prob", True),
        "shared_intermediate_size": hf.get("shared_expert_intermediate_size", 512),
        "shared_expert_gate": True,
    }


def hybrid(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the Config but for the MLPs' that differ from Llama's."""
    refuse(hf, attention_bias=False, hidden_act="silu")
    layers, interval = range(1, hf["num_hidden_layers"] + 1), hf.get("full_attention_interval") or 4
    kinds = hf.get("layer_types") or ["linear_attention" if i % interval else "full_attention" for i in layers]
    if unknown := sorted(set(kinds) - set(MIXERS)):
        raise UserError(f"config.json: layer_types {unknown} are not supported; expected {sorted(MIXERS)}")
    return {
        **llama.config({"intermediate_size": 0} | hf),
        **rope({"partial_rotary_factor": 0.25} | hf),
        "head_size": hf.get("head_dim") or 256,
        "qk_norm": "head",
        "norm_class": "UnitOffsetRMSNorm",
        "attention_gate": True,
        "mixers": [MIXERS[kind] for kind in kinds],
        "conv_size": hf.get("linear_conv_kernel_dim", 4),
        "state_heads": hf.get("linear_num_value_heads", 32),
        "state_head_size": hf.get("linear_value_head_dim", 128),
        "state_groups": hf.get("linear_num_key_heads", 16),
        "state_size": hf.get("linear_key_head_dim", 128),
    }


def weights(config: Config) -> Table:
    mixer, groups, own = "model.layers.{}.linear_attn.", config.state_groups, config.state_heads // config.state_groups
    values = own * config.state_head_size
    # of each group the query's rows, the key's, its heads' values and gates; then rates and decays
    parts = (config.state_size, config.state_size, values, values), (own, own)
    return {
        **hybrid_weights(config),
        "h.{}.mixer.qkv": Interleaved((mixer + "in_proj_qkvz", mixer + "in_proj_ba"), (groups, groups), parts),
    }


def hybrid_weights(config: Config) -> Table:
    """Return the places of all tensors but the input projections of gated delta nets."""
    layer, mixer = "model.layers.{}.", "model.layers.{}.linear_attn"
    return {
        **qwen.weights(config),
        **(expert_weights(config, layer + "mlp.") if config.n_expert else {}),
        "h.{}.attn.qkv": gated_attention(config, tuple(f"{layer}self_attn.{x}_proj" for x in "qkv")),
        "h.{}.mixer": mixer,
        "h.{}.mixer.conv": mixer + ".conv1d",
        "h.{}.mixer.norm": mixer + ".norm",
        "h.{}.mixer.proj": mixer + ".out_proj",
    }


def gated_attention(config: Config, modules: tuple[str, ...]) -> Place:
    """Return the place of queries, keys and values: of each head the query's rows, then its gate's."""
    (_, k, v), heads, size = config.qkv_sizes, config.n_head, config.head_size
    return Interleaved(modules, (heads, 1, 1), ((size, size), (k,), (v,)), order=(0, 2, 3, 1))


def expert_weights(config: Config, mlp: str) -> Table:
    inner, shared = config.shared_intermediate_size, mlp + "shared_expert."
    return {
        **mixtral.experts(config, mlp, "gate_proj", "up_proj", "down_proj"),
        "h.{}.mlp.router": mlp + "gate",
        "h.{}.mlp.shared.gate_up": Stacked((shared + "gate_proj", shared + "up_proj"), (inner, inner)),
        "h.{}.mlp.shared.proj": shared + "down_proj",
        "h.{}.mlp.shared_gate": mlp + "shared_expert_gate",
    }


ARCHITECTURES = ("qwen3next",)


def gguf(config: Config) -> Layout:
    groups, own = config.state_groups, config.state_heads // config.state_groups
    keys, values = groups * config.state_size, config.state_heads * config.state_head_size
    # queries, keys and values; the output's gate; of each group its heads' rates, then their decays
    modules = tuple("blk.{}." + name for name in ("attn_qkv", "attn_gate", "ssm_ba"))
    parts = (2 * keys + values,), (values,), (own, own)
    mixer: dict[str, str | Place] = {
        "h.{}.mixer.qkv": Interleaved(modules, (1, 1, groups), parts),
        "h.{}.mixer.conv": Squeezed(("blk.{}.ssm_conv1d",), 1),
        "h.{}.mixer.A_log": chained(Decay(()), Named(("blk.{}.ssm_a",))),
        "h.{}.mixer.dt_bias": Named(("blk.{}.ssm_dt.bias",)),
        "h.{}.mixer.norm": "blk.{}.ssm_norm",
        "h.{}.mixer.proj": "blk.{}.ssm_out",
    }
    return hybrid_gguf("qwen3next", config, mixer)


def hybrid_gguf(architecture: str, config: Config, mixer: Table, **metadata: Any) -> Layout:
    """Return llama.cpp's layout of a hybrid, given that of its gated delta nets.

    Raises:
        UserError: attention does not come every few layers, or values and keys differ in size.
    """
    attends = [layer for layer in range(config.n_layer) if config.mixer(layer) == "attention"]
    interval = attends[0] + 1 if attends else 0
    if not interval or attends != list(range(config.n_layer))[interval - 1 :: interval]:
        raise UserError(f"--format gguf: llama.cpp's {architecture} has attention in one layer of each so many")
    if config.state_size != config.state_head_size or not config.norm_expert_weights:
        raise UserError(
            f"--format gguf: llama.cpp's {architecture} has values of the keys' size, and weights that sum to 1"
        )
    return Layout(
        architecture,
        norm_offset=1.0,
        metadata={
            "attention.head_count_kv": config.n_query_groups,
            "full_attention_interval": interval,
            **granite_hybrid.mamba2_metadata(config),
            **metadata,
        },
        places={
            "h.{}.norm_2": Offset(("blk.{}.post_attention_norm",), 1.0),
            "h.{}.attn.qkv": gated_attention(config, tuple(f"blk.{{}}.attn_{x}" for x in "qkv")),
            "h.{}.mlp.shared_gate": Squeezed(("blk.{}.ffn_gate_inp_shexp",), 0),
            **mixer,
        },
    )


def from_gguf(said: Said) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        **hybrid_from_gguf(said),
        **experts_from_gguf(said),
    }


def hybrid_from_gguf(said: Said) -> dict[str, Any]:
    """Return the fields of config.json that all hybrids of Qwen have."""
    heads, head_size = said.need("ssm.time_step_rank", int), said.need("attention.key_length", int)
    rotated = said.get("rope.dimension_count", int, head_size) / head_size
    return {
        "attention_bias": False,
        "partial_rotary_factor": rotated,
        "full_attention_interval": said.get("full_attention_interval", int, 4),
        "linear_conv_kernel_dim": said.need("ssm.conv_kernel", int),
        "linear_num_key_heads": said.need("ssm.group_count", int),
        "linear_num_value_heads": heads,
        "linear_key_head_dim": said.need("ssm.state_size", int),
        "linear_value_head_dim": said.need("ssm.inner_size", int) // heads,
    }


def experts_from_gguf(said: Said) -> dict[str, Any]:
    """Return the fields of config.json for experts."""
    return {
        "num_experts": said.need("expert_count", int),
        "num_experts_per_tok": said.need("expert_used_count", int),
        "moe_intermediate_size": said.need("expert_feed_forward_length", int),
        "shared_expert_intermediate_size": said.need("expert_shared_feed_forward_length", int),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def tiny_size_of_hybrid(**fields: Any) -> dict[str, Any]:
    """Return the fields of a small transformers configuration with a layer of each kind."""
    own: dict[str, Any] = dict(
        num_key_value_heads=2, head_dim=16, linear_key_head_dim=8, linear_value_head_dim=12, linear_num_key_heads=2,
        linear_num_value_heads=4, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    return tiny_size(**own | fields)


TINY_EXPERTS: dict[str, Any] = dict(
    num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=32
)


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import Qwen3NextConfig

    return {"qwen3_next": Qwen3NextConfig(**tiny_size_of_hybrid(**TINY_EXPERTS | fields))}
