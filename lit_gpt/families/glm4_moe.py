"""GLM 4.5 (GLM Team 2025): experts that sigmoids score, with corrections that balance them, one that all tokens go to,
and dense first layers; half of each head rotated."""

from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families import llama, mixtral, qwen_moe
from lit_gpt.families.fields import rope, sigmoid_router, tiny_size
from lit_gpt.families.tables import Layout, Said, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("glm4_moe",)
# What transformers takes for fields that a config.json leaves out.
DEFAULTS = {"glm4_moe": dict(max_position_embeddings=131072, num_key_value_heads=8)}

LEFT_OUT = dict.fromkeys(("model.layers.46.*", "model.layers.92.*"), "the layer that predicts further tokens")

PRESETS = {
    "GLM-4.5-Air": llama.preset(
        46, 96, 8, 4096, 10944, 151552, model_type="glm4_moe", head_dim=128, max_position_embeddings=131072,
        rms_norm_eps=1e-5, rope_theta=1e6, partial_rotary_factor=0.5, attention_bias=True, n_routed_experts=128,
        n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=1408, first_k_dense_replace=1,
        routed_scaling_factor=1.0, norm_topk_prob=True, num_nextn_predict_layers=0,
    ),
}  # fmt: skip


def config(hf: dict[str, Any]) -> dict[str, Any]:
    size = hf["moe_intermediate_size"]
    return llama.config({"rms_norm_eps": 1e-5} | hf) | {
        "proj_bias": False,
        "qk_norm": "head" if hf.get("use_qk_norm") else None,
        "mlp_class": "MoE",
        "intermediate_size": size,
        "n_expert": hf.get("n_routed_experts") or hf["num_local_experts"],
        "n_expert_per_token": hf.get("num_experts_per_tok", 8),
        **sigmoid_router(hf),
        "shared_intermediate_size": size * hf.get("n_shared_experts", 1),
        "dense_layers": list(range(hf.get("first_k_dense_replace", 1))),
        "dense_intermediate_size": hf["intermediate_size"],
        **rope({"partial_rotary_factor": 0.5} | hf),  # the family's default
    }


def weights(config: Config) -> Table:
    return {**qwen_moe.weights(config), **mixtral.shared(config, "model.layers.{}.mlp.shared_experts.")}


ARCHITECTURES = ("glm4moe",)


def gguf(config: Config) -> Layout:
    if config.n_expert_group > 1 or config.dense_layers != list(range(len(config.dense_layers))):
        raise UserError("--format gguf: llama.cpp's glm4moe has no groups of experts, and dense layers come first")
    shared = config.shared_intermediate_size // config.intermediate_size
    routing = {
        "expert_shared_count": shared,
        "expert_shared_feed_forward_length": None,
        "expert_weights_norm": config.norm_expert_weights,
        "expert_weights_scale": config.expert_scale,
        "expert_gating_func": 2,  # sigmoid
        "expert_group_count": 1,
        "expert_group_used_count": 1,
    }
    return Layout("glm4moe", metadata=routing, places={"h.{}.norm_2": "blk.{}.post_attention_norm"})


def from_gguf(said: Said) -> dict[str, Any]:
    head_size = said.need("attention.key_length", int)
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "moe_intermediate_size": said.need("expert_feed_forward_length", int),
        "n_routed_experts": said.need("expert_count", int),
        "num_experts_per_tok": said.need("expert_used_count", int),
        "n_shared_experts": said.get("expert_shared_count", int, 1),
        "first_k_dense_replace": said.get("leading_dense_block_count", int, 0),
        "norm_topk_prob": said.get("expert_weights_norm", bool, True),
        "routed_scaling_factor": said.get("expert_weights_scale", float, 1.0),
        "n_group": 1,
        "topk_group": 1,
        "use_qk_norm": said.holds("blk.0.attn_q_norm.weight"),
        "partial_rotary_factor": said.get("rope.dimension_count", int, head_size) / head_size,
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import Glm4MoeConfig

    own: dict[str, Any] = dict(
        num_key_value_heads=2, head_dim=24, moe_intermediate_size=24, n_routed_experts=6, num_experts_per_tok=2,
        n_group=2, topk_group=1, routed_scaling_factor=1.5, attention_bias=True, use_qk_norm=True,
        num_nextn_predict_layers=0,
    )  # fmt: skip
    return {"glm4_moe": Glm4MoeConfig(**tiny_size(**own | fields))}
