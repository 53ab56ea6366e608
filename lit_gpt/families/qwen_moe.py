"""Qwen 3 with experts (Qwen Team 2025): Qwen 3's attention, and 128 small experts of which each token goes to eight."""

from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families import llama, mixtral, qwen
from lit_gpt.families.fields import refuse, tiny_size
from lit_gpt.families.tables import Layout, Said, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("qwen3_moe",)
# What transformers takes for fields that a config.json leaves out.
DEFAULTS = {"qwen3_moe": dict(max_position_embeddings=32768, num_key_value_heads=4, sliding_window=4096)}

_30B = llama.preset(
    48, 32, 4, 2048, 6144, 151936, model_type="qwen3_moe", head_dim=128, max_position_embeddings=40960, rope_theta=1e6,
    num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
)  # fmt: skip
_LATER: dict[str, Any] = dict(_30B, max_position_embeddings=262144, rope_theta=1e7)
PRESETS = {
    "Qwen3-30B-A3B": _30B,
    "Qwen3-30B-A3B-Instruct-2507": _LATER,
    "Qwen3-30B-A3B-Thinking-2507": _LATER,
    "Qwen3-Coder-30B-A3B-Instruct": _LATER,
    "Qwen3-235B-A22B": dict(_30B, num_hidden_layers=94, num_attention_heads=64, hidden_size=4096,
                            moe_intermediate_size=1536),
}  # fmt: skip


def config(hf: dict[str, Any]) -> dict[str, Any]:
    dense = {"mlp_only_layers": hf.get("mlp_only_layers") or []}
    refuse(hf | dense, decoder_sparse_step=1, mlp_only_layers=[], attention_bias=False)
    return {
        **llama.config(hf),
        "sliding_window": hf.get("sliding_window") if hf.get("use_sliding_window") else None,
        "qk_norm": "head",
        "mlp_class": "MoE",
        "intermediate_size": hf["moe_intermediate_size"],
        "n_expert": hf.get("num_experts") or hf["num_local_experts"],
        "n_expert_per_token": hf["num_experts_per_tok"],
        "norm_expert_weights": hf.get("norm_topk_prob", False),
    }


def weights(config: Config) -> Table:
    mlp = "model.layers.{}.mlp."
    return {
        **qwen.weights(config),
        "h.{}.mlp.router": mlp + "gate",
        **mixtral.experts(config, mlp, "gate_proj", "up_proj", "down_proj"),
    }


ARCHITECTURES = ("qwen3moe",)


def gguf(config: Config) -> Layout:
    if not config.norm_expert_weights:
        raise UserError("--format gguf: llama.cpp's qwen3moe has the weights of a token's experts sum to 1")
    return Layout("qwen3moe", unread="" if config.intermediate_size == 768 else "takes the size of experts to be 768")


def from_gguf(said: Said) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": said.need("expert_count", int),
        "num_experts_per_tok": said.need("expert_used_count", int),
        "moe_intermediate_size": said.need("expert_feed_forward_length", int),
        "norm_topk_prob": True,
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import Qwen3MoeConfig

    own = dict(moe_intermediate_size=24, num_key_value_heads=2, head_dim=24, num_experts=6, num_experts_per_tok=3)
    return {"qwen3_moe": Qwen3MoeConfig(**tiny_size(**own | fields))}
