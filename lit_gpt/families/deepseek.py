"""DeepSeek V2 and V3 (DeepSeek-AI 2024) and what is built like them, R1 and Moonlight: latent attention, many small
experts of the best groups and some that all tokens go to, and dense first layers."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, cat

from lit_gpt.errors import UserError
from lit_gpt.families import llama, mixtral
from lit_gpt.families.fields import refuse, sigmoid_router, tiny_size
from lit_gpt.families.tables import Layout, Place, Reordered, Said, Table, neighbors_apart
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
    names = "q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa"
    return {
        **llama.weights(config),
        **mixtral.experts(config, mlp, "gate_proj", "up_proj", "down_proj"),
        **mixtral.shared(config, mlp + "shared_experts."),
        "h.{}.mlp.router": mlp + "gate",
        **projections(config, *(attention + name for name in names)),
        "h.{}.mixer.q_norm": attention + "q_a_layernorm",
        "h.{}.mixer.kv_norm": attention + "kv_a_layernorm",
        "h.{}.mixer.kv_up": Place((attention + "kv_b_proj",)),
        "h.{}.mixer.proj": attention + "o_proj",
    }


def projections(config: Config, q: str, q_a: str, q_b: str, kv_a: str) -> dict[str, Place]:
    """Return the places of what makes queries, latents and the shared key, by their names in the file."""
    head, rotated, latent = config.head_size, config.rotated_size, config.latent_size
    turned = neighbors_apart(rotated, rotated)
    # of each stored head the elements that are rotated come last, and a rotated pair's are neighbors
    heads = (*(head - rotated + i for i in turned), *range(head - rotated))
    shared = (*range(latent), *(latent + i for i in turned))
    queries, low = config.n_head * head, config.query_latent
    first, rows, order = (q_a, low, (0,)) if low else (q, queries, heads)
    return {
        "h.{}.mixer.qkv": Reordered((first, kv_a), (rows, latent + rotated), (order, shared)),
        "h.{}.mixer.q_up": Reordered((q_b,), (queries,), (heads,)),
    }


@dataclass(frozen=True)
class KeysAndValues(Place):
    """What makes all heads' keys and values of latents, stored apart: (heads, latent_size, keys), which is multiplied
    by queries, and (heads, values, latent_size)."""

    keys: int
    values: int

    def to_lit(self, tensors: list[Tensor]) -> Tensor:
        return cat((tensors[0].mT, tensors[1]), dim=1).flatten(0, 1)

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        keys, values = tensor.unflatten(0, (-1, self.keys + self.values)).split((self.keys, self.values), dim=1)
        return [keys.mT, values]


ARCHITECTURES = ("deepseek2",)
MSCALES = ("mscale", "mscale_all_dim")


def gguf(config: Config) -> Layout:
    scaling, dense = config.rope_scaling or {}, len(config.dense_layers)
    if scaling.get("mscale") != scaling.get("mscale_all_dim"):
        raise UserError("--format gguf: llama.cpp's deepseek2 has YaRN whose mscale is that of all dims")
    if config.dense_layers != list(range(dense)) or config.n_expert_group > 1 and config.n_best_of_group != 2:
        raise UserError(
            "--format gguf: llama.cpp's deepseek2 has dense layers first, and groups as good as their best two"
        )
    if (config.query_latent == 0) != (config.n_layer in (26, 27)):
        raise UserError(
            "--format gguf: llama.cpp's deepseek2 has latents for queries, but for models of 26 or 27 layers"
        )
    attention, unrotated = "blk.{}.attn_", config.head_size - config.rotated_size
    kv_up = KeysAndValues((attention + "k_b", attention + "v_b"), unrotated, config.value_head_size)
    return Layout(
        "deepseek2",
        scaling=MSCALES,
        metadata=latent_metadata(config)
        | {
            "rope.scaling.yarn_log_multiplier": 0.1 * scaling["mscale_all_dim"]
            if "mscale_all_dim" in scaling
            else None,
            "leading_dense_block_count": dense,
            "expert_shared_count": config.shared_intermediate_size // config.intermediate_size,
            "expert_shared_feed_forward_length": None,
            "expert_weights_norm": config.norm_expert_weights,
            "expert_weights_scale": float(config.expert_scale),
            "expert_gating_func": 2 if config.router_score == "sigmoid" else 1,
            "expert_group_count": config.n_expert_group,
            "expert_group_used_count": config.n_group_per_token,
        },
        places={
            **projections(config, *(attention + name for name in ("q", "q_a", "q_b", "kv_a_mqa"))),
            "h.{}.mixer.q_norm": attention + "q_a_norm",
            "h.{}.mixer.kv_norm": attention + "kv_a_norm",
            "h.{}.mixer.kv_up": kv_up,
            "h.{}.mixer.proj": attention + "output",
        },
    )


def latent_metadata(config: Config) -> dict[str, Any]:
    """Return the metadata of latent attention, which is one head of latents and a rotated key there."""
    return {
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": config.query_latent or None,
        "attention.kv_lora_rank": config.latent_size,
        "attention.key_length": config.latent_size + config.rotated_size,
        "attention.value_length": config.latent_size,
        "attention.key_length_mla": config.head_size,
        "attention.value_length_mla": config.value_head_size,
    }


def from_gguf(said: Said) -> dict[str, Any]:
    sigmoid, groups = said.get("expert_gating_func", int, 1) == 2, said.get("expert_group_count", int, 1)
    scaling, rotated = said.rope_scaling, said.need("rope.dimension_count", int)
    if scaling and (log_multiplier := said.get("rope.scaling.yarn_log_multiplier", float)):
        scaling |= dict.fromkeys(MSCALES, round(10 * log_multiplier, 6))
    return {
        "architectures": [f"DeepseekV{3 if sigmoid else 2}ForCausalLM"],
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "num_key_value_heads": said.need("attention.head_count", int),
        "head_dim": rotated,
        "q_lora_rank": said.get("attention.q_lora_rank", int),
        "kv_lora_rank": said.need("attention.kv_lora_rank", int),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": said.need("attention.key_length_mla", int) - rotated,
        "v_head_dim": said.need("attention.value_length_mla", int),
        "rope_scaling": scaling,
        "moe_intermediate_size": said.need("expert_feed_forward_length", int),
        "n_routed_experts": said.need("expert_count", int),
        "n_shared_experts": said.get("expert_shared_count", int, 0),
        "num_experts_per_tok": said.need("expert_used_count", int),
        "first_k_dense_replace": said.get("leading_dense_block_count", int, 0),
        "norm_topk_prob": said.get("expert_weights_norm", bool, False),
        "routed_scaling_factor": said.get("expert_weights_scale", float, 1.0),
        "topk_method": "group_limited_greedy" if groups > 1 and not sigmoid else "greedy",
        "n_group": groups,
        "topk_group": said.get("expert_group_used_count", int, 1),
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
