"""DeepSeek V2 and V3 (DeepSeek-AI 2024) and what is built like them, R1 and Moonlight: latent attention, many small
experts of the best groups and some that all tokens go to, and dense first layers."""

import math
from typing import Any

from lit_gpt.families import llama, mixtral
from lit_gpt.families.fields import refuse, sigmoid_router, tiny_size
from lit_gpt.families.tables import Place, Reordered, Table, neighbors_apart
from lit_gpt.model.config import Config

MODEL_TYPES = ("deepseek_v2", "deepseek_v3")
# What transformers takes for fields that a config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v2": dict(q_lora_rank=1536, n_routed_experts=64, n_shared_experts=2, first_k_dense_replace=0,
                        topk_method="greedy", moe_intermediate_size=1407, routed_scaling_factor=1.0),
    "deepseek_v3": dict(max_position_embeddings=4096, q_lora_rank=1536, n_routed_experts=256, n_shared_experts=1,
                        first_k_dense_replace=3, n_group=8, topk_group=4, num_experts_per_tok=8,
                        moe_intermediate_size=2048, routed_scaling_factor=2.5),
}  # fmt: skip

LEFT_OUT = {"model.layers.61.*": "the layer that predicts further tokens"}

_YARN: dict[str, Any] = dict(
    rope_type="yarn", factor=40.0, beta_fast=32.0, beta_slow=1.0, original_max_position_embeddings=4096
)
_SIZES: dict[str, Any] = dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
_16B: dict[str, Any] = dict(
    _SIZES, q_lora_rank=None, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1,
    moe_intermediate_size=1408, n_group=1, topk_group=1,
)  # fmt: skip
_V2_LITE = llama.preset(
    27, 16, 16, 2048, 10944, 102400, model_type="deepseek_v2", max_position_embeddings=163840, topk_method="greedy",
    routed_scaling_factor=1.0, rope_scaling=dict(_YARN, mscale=0.707, mscale_all_dim=0.707), **_16B,
)  # fmt: skip
_V3 = llama.preset(
    61, 128, 128, 7168, 18432, 129280, model_type="deepseek_v3", max_position_embeddings=163840, q_lora_rank=1536,
    n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, first_k_dense_replace=3, n_group=8, topk_group=4,
    moe_intermediate_size=2048, routed_scaling_factor=2.5, num_nextn_predict_layers=0,
    rope_scaling=dict(_YARN, mscale=1.0, mscale_all_dim=1.0), **_SIZES,
)  # fmt: skip
_MOONLIGHT = llama.preset(
    27, 16, 16, 2048, 11264, 163840, model_type="deepseek_v3", max_position_embeddings=8192, rms_norm_eps=1e-5,
    rope_theta=50000.0, routed_scaling_factor=2.446, num_nextn_predict_layers=0, **_16B,
)  # fmt: skip
PRESETS = {
    "DeepSeek-V2-Lite": _V2_LITE,
    "DeepSeek-V2-Lite-Chat": _V2_LITE,
    "DeepSeek-V3": _V3,
    "DeepSeek-R1": _V3,
    "Moonlight-16B-A3B": _MOONLIGHT,
}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    refuse(hf, attention_bias=False, mlp_bias=False)
    first = latent_attention(hf) | experts(hf)
    if hf["model_type"] == "deepseek_v3":
        return first
    grouped = hf.get("topk_method") == "group_limited_greedy"
    return first | {
        "router_score": "softmax",
        "router_correction": False,
        "n_expert_group": hf["n_group"] if grouped else 1,
        "n_group_per_token": hf["topk_group"] if grouped else 1,
        "n_best_of_group": 1,
        "norm_expert_weights": False,
    }


def latent_attention(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the Config but for the MLPs' that differ from Llama's."""
    refuse(hf, rope_interleave=True)
    common, unrotated, rotated = llama.config(hf), hf.get("qk_nope_head_dim", 128), hf.get("qk_rope_head_dim", 64)
    scale, scaling = (unrotated + rotated) ** -0.5, common["rope_scaling"] or {}
    if weight := scaling.get("mscale_all_dim"):  # by which YaRN's factor multiplies queries and keys
        scale *= (0.1 * weight * math.log(max(scaling["factor"], 1.0)) + 1.0) ** 2
    return common | {
        "n_query_groups": hf["num_attention_heads"],
        "mixers": ["latent_attention"] * hf["num_hidden_layers"],
        "head_size": unrotated + rotated,
        "rotated_size": rotated,
        "query_latent": hf.get("q_lora_rank") or 0,
        "latent_size": hf.get("kv_lora_rank", 512),
        "value_head_size": hf.get("v_head_dim", 128),
        "attention_scale": scale,
    }


def experts(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the Config for experts that sigmoids score."""
    size = hf["moe_intermediate_size"]
    return {
        "mlp_class": "MoE",
        "intermediate_size": size,
        "n_expert": hf.get("n_routed_experts") or hf["num_local_experts"],
        "n_expert_per_token": hf["num_experts_per_tok"],
        **sigmoid_router(hf),
        "expert_scale": hf["routed_scaling_factor"],  # which its configurations name
        "shared_intermediate_size": size * (hf.get("n_shared_experts") or 0),
        "dense_layers": list(range(min(hf.get("first_k_dense_replace") or 0, hf["num_hidden_layers"]))),
        "dense_intermediate_size": hf["intermediate_size"],
    }


def weights(config: Config) -> Table:
    attention, mlp = "model.layers.{}.self_attn.", "model.layers.{}.mlp."
    head, rotated, latent = config.head_size, config.rotated_size, config.latent_size
    turned = neighbors_apart(rotated, rotated)
    # of each stored head the elements that are rotated come last, and a rotated pair's are neighbors
    heads = (*(head - rotated + i for i in turned), *range(head - rotated))
    shared = (*range(latent), *(latent + i for i in turned))
    queries, first = config.n_head * head, config.query_latent
    q = ("q_a_proj", first, (0,)) if first else ("q_proj", queries, heads)
    return {
        **llama.weights(config),
        **mixtral.experts(config, mlp, "gate_proj", "up_proj", "down_proj"),
        **mixtral.shared(config, mlp + "shared_experts."),
        "h.{}.mlp.router": mlp + "gate",
        "h.{}.mixer.qkv": Reordered(
            (attention + q[0], attention + "kv_a_proj_with_mqa"), (q[1], latent + rotated), (q[2], shared)
        ),
        "h.{}.mixer.q_norm": attention + "q_a_layernorm",
        "h.{}.mixer.q_up": Reordered((attention + "q_b_proj",), (queries,), (heads,)),
        "h.{}.mixer.kv_norm": attention + "kv_a_layernorm",
        "h.{}.mixer.kv_up": Place((attention + "kv_b_proj",)),
        "h.{}.mixer.proj": attention + "o_proj",
    }


TINY: dict[str, Any] = dict(
    num_key_value_heads=4, q_lora_rank=20, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10,
    moe_intermediate_size=24, n_routed_experts=6, num_experts_per_tok=2, routed_scaling_factor=1.5,
)  # fmt: skip


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import DeepseekV2Config, DeepseekV3Config

    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
            "mscale": 0.7, "mscale_all_dim": 0.9}  # fmt: skip
    size = tiny_size(**TINY | dict(first_k_dense_replace=1) | fields)
    grouped: dict[str, Any] = dict(topk_method="group_limited_greedy", n_group=3, topk_group=2)
    two_shared: dict[str, Any] = dict(n_group=2, topk_group=1, n_shared_experts=2, num_nextn_predict_layers=0)
    return {
        "deepseek_v2": DeepseekV2Config(**size | dict(q_lora_rank=None), **grouped),
        "deepseek_v3": DeepseekV3Config(**size, **two_shared, rope_parameters=yarn),
    }
