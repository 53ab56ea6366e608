"""Phi-3.5-MoE (Abdin et al. 2024): experts that SparseMixer chooses, LayerNorms, biases, and LongRoPE.

Training routes as inference does: each token to its likeliest experts, by gradients of their weights. The authors drew
experts at random, for gradients of the choice itself (Liu et al. 2024, GRIN, arXiv 2409.12136).

Beyond the original context angles are the long ones, as in the authors' code; transformers 5 keeps to the short ones.
"""

from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families import llama, mixtral
from lit_gpt.families.fields import refuse, rope, tiny_size
from lit_gpt.families.tables import Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("phimoe",)
# What transformers takes for fields that a config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "phimoe": dict(
        max_position_embeddings=131072, num_key_value_heads=8, num_local_experts=16, num_experts_per_tok=2,
        rms_norm_eps=1e-5, router_jitter_noise=0.01,
    )
}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    refuse(hf, input_jitter_noise=0.0)
    return llama.config(hf) | {
        "norm_class": "LayerNorm",
        "sliding_window": hf.get("sliding_window"),
        "mlp_class": "MoE",
        "n_expert": hf["num_local_experts"],
        "n_expert_per_token": hf["num_experts_per_tok"],
        "router_score": "sparsemixer",
        "router_margin": 2 * hf["router_jitter_noise"],
        "norm_expert_weights": False,
        "head_bias": hf.get("lm_head_bias", False),
        **longrope(hf),
    }


def longrope(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary fields of the Config.

    Raises:
        UserError: short and long sequences have different factors on cos and sin.
    """
    fields = rope({"rope_theta": 1e6} | hf)
    if not fields["rope_scaling"]:
        return fields
    scaling = dict(fields["rope_scaling"])
    short, long = (scaling.pop(name, None) for name in ("short_mscale", "long_mscale"))
    if short is None or short != long:
        raise UserError(f"config.json: 'short_mscale' and 'long_mscale': {short}, {long}: expected one number for both")
    original = scaling.get("original_max_position_embeddings") or hf.get("original_max_position_embeddings", 4096)
    scaling |= {"original_max_position_embeddings": original, "attention_factor": short}
    return fields | {"rope_scaling": scaling}


def weights(config: Config) -> Table:
    mlp = "model.layers.{}.block_sparse_moe."
    experts = mixtral.experts(config, mlp, "w1", "w3", "w2")
    return {**llama.weights(config), "h.{}.mlp.router": mlp + "gate", **experts}


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import PhimoeConfig

    divisors = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "long_factor": [8.0] * 8}
    scaling = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 256,
               "short_mscale": 1.2, "long_mscale": 1.2, **divisors}  # fmt: skip
    size = tiny_size(
        **dict(intermediate_size=24, num_key_value_heads=2, num_local_experts=5, sliding_window=5) | fields
    )
    large_margin: dict[str, Any] = dict(router_jitter_noise=0.2, attention_bias=True, lm_head_bias=True)
    return {"phimoe": PhimoeConfig(**size, **large_margin, rope_parameters=scaling)}
