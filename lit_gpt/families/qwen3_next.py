"""Qwen3-Next (Qwen Team 2025): three layers of gated delta nets, then one of attention whose output is gated; norms
whose weights are distances from 1; many small experts and one that all tokens go through."""

from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families import llama, mixtral, qwen
from lit_gpt.families.fields import refuse, rope, tiny_size
from lit_gpt.families.tables import Interleaved, Stacked, Table
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
    (_, k, v), heads, size = config.qkv_sizes, config.n_head, config.head_size
    attention = tuple(f"{layer}self_attn.{x}_proj" for x in "qkv")
    return {
        **qwen.weights(config),
        **(expert_weights(config, layer + "mlp.") if config.n_expert else {}),
        # of each head the query's rows, then the gate's
        "h.{}.attn.qkv": Interleaved(attention, (heads, 1, 1), ((size, size), (k,), (v,)), order=(0, 2, 3, 1)),
        "h.{}.mixer": mixer,
        "h.{}.mixer.conv": mixer + ".conv1d",
        "h.{}.mixer.norm": mixer + ".norm",
        "h.{}.mixer.proj": mixer + ".out_proj",
    }


def expert_weights(config: Config, mlp: str) -> Table:
    inner, shared = config.shared_intermediate_size, mlp + "shared_expert."
    return {
        **mixtral.experts(config, mlp, "gate_proj", "up_proj", "down_proj"),
        "h.{}.mlp.router": mlp + "gate",
        "h.{}.mlp.shared.gate_up": Stacked((shared + "gate_proj", shared + "up_proj"), (inner, inner)),
        "h.{}.mlp.shared.proj": shared + "down_proj",
        "h.{}.mlp.shared_gate": mlp + "shared_expert_gate",
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
