"""GLM 4.7 Flash (GLM Team 2026): DeepSeek V3's latent attention, and GLM 4.5's experts, which are the same."""

from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families import deepseek, llama
from lit_gpt.families.fields import refuse, rope, tiny_size

MODEL_TYPES = ("glm4_moe_lite",)
# What transformers takes for fields that a config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "glm4_moe_lite": dict(max_position_embeddings=202752, rms_norm_eps=1e-5, q_lora_rank=768, qk_nope_head_dim=192,
                          v_head_dim=256, n_routed_experts=64, n_shared_experts=1, num_experts_per_tok=4,
                          moe_intermediate_size=1536, routed_scaling_factor=1.8),
}  # fmt: skip

LEFT_OUT = {"model.layers.47.*": "the layer that predicts further tokens"}

PRESETS = {
    "GLM-4.7-Flash": llama.preset(
        47, 20, 20, 2048, 10240, 154880, model_type="glm4_moe_lite", max_position_embeddings=202752, rms_norm_eps=1e-5,
        rope_theta=1e6, kv_lora_rank=512, q_lora_rank=768, qk_nope_head_dim=192, qk_rope_head_dim=64, v_head_dim=256,
        n_routed_experts=64, n_shared_experts=1, num_experts_per_tok=4, moe_intermediate_size=1536,
        routed_scaling_factor=1.8,
    ),
}  # fmt: skip


def config(hf: dict[str, Any]) -> dict[str, Any]:
    refuse(hf, attention_bias=False)
    if rope(hf)["rotary_percentage"] != 1.0:
        raise UserError("config.json: 'partial_rotary_factor' is not supported; expected 1")
    layers = range(hf["num_hidden_layers"])
    kinds = hf.get("mlp_layer_types") or ["sparse" if layer else "dense" for layer in layers]
    dense = [layer for layer in layers if kinds[layer] == "dense"]
    return {**deepseek.latent_attention(hf), **deepseek.experts(hf), "dense_layers": dense}


weights, gguf = deepseek.weights, deepseek.gguf


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import Glm4MoeLiteConfig

    wide = dict(v_head_dim=24, n_group=1, topk_group=1)  # values larger than keys
    return {"glm4_moe_lite": Glm4MoeLiteConfig(**tiny_size(**deepseek.TINY | wide | fields))}
