"""Qwen 1.5 and 2 with experts (Qwen Team 2024): Qwen 2's attention, small experts, and one that all tokens go to, which
each scales by itself."""

from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families import llama, mixtral, qwen_moe
from lit_gpt.families.fields import tiny_size, windows
from lit_gpt.families.tables import Layout, Said, Squeezed, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("qwen2_moe",)
# What transformers takes for fields that a config.json leaves out.
DEFAULTS = {"qwen2_moe": dict(max_position_embeddings=32768, num_key_value_heads=16)}

_A2_7B = llama.preset(
    24, 16, 16, 2048, 5632, 151936, model_type="qwen2_moe", max_position_embeddings=8192, rope_theta=1e6,
    num_experts=60, num_experts_per_tok=4, moe_intermediate_size=1408, shared_expert_intermediate_size=5632,
)  # fmt: skip
PRESETS = {"Qwen1.5-MoE-A2.7B": _A2_7B, "Qwen1.5-MoE-A2.7B-Chat": _A2_7B}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    layers, windowed = range(hf["num_hidden_layers"]), hf.get("use_sliding_window")
    last = hf.get("max_window_layers", 28)
    kinds = [
        "full_attention" if layer % 2 or layer >= last or not windowed else "sliding_attention" for layer in layers
    ]
    return llama.config(hf) | {
        **windows(hf, kinds),
        "qkv_bias": hf.get("qkv_bias", True),
        "mlp_class": "MoE",
        "intermediate_size": hf["moe_intermediate_size"],
        "n_expert": hf.get("num_experts", 60),
        "n_expert_per_token": hf.get("num_experts_per_tok", 4),
        "norm_expert_weights": hf.get("norm_topk_prob", False),
        "shared_intermediate_size": hf["shared_expert_intermediate_size"],
        "shared_expert_gate": True,
        "dense_layers": mixtral.dense_layers(hf),
        "dense_intermediate_size": hf["intermediate_size"],
    }


def weights(config: Config) -> Table:
    mlp = "model.layers.{}.mlp."
    return {
        **qwen_moe.weights(config),
        **mixtral.shared(config, mlp + "shared_expert."),
        "h.{}.mlp.shared_gate": mlp + "shared_expert_gate",
    }


ARCHITECTURES = ("qwen2moe",)


def gguf(config: Config) -> Layout:
    if config.norm_expert_weights or config.dense_layers:
        raise UserError("--format gguf: llama.cpp's qwen2moe has experts in all layers, whose weights do not sum to 1")
    gate = Squeezed(("blk.{}.ffn_gate_inp_shexp",), 0)
    return Layout("qwen2moe", places={"h.{}.mlp.shared_gate": gate}, unread="takes not all sizes over")


def from_gguf(said: Said) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "attention_bias": False,
        "qkv_bias": said.holds("blk.0.attn_q.bias"),
        "num_experts": said.need("expert_count", int),
        "num_experts_per_tok": said.need("expert_used_count", int),
        "moe_intermediate_size": said.need("expert_feed_forward_length", int),
        "shared_expert_intermediate_size": said.need("expert_shared_feed_forward_length", int),
        "norm_topk_prob": False,
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import Qwen2MoeConfig

    own: dict[str, Any] = dict(
        num_key_value_heads=2, moe_intermediate_size=24, shared_expert_intermediate_size=40, num_experts=6,
        num_experts_per_tok=3,
    )  # fmt: skip
    size = tiny_size(**own | fields)
    return {"qwen2_moe": Qwen2MoeConfig(**size), "dense-layer": Qwen2MoeConfig(**size, mlp_only_layers=[0])}
