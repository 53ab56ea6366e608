"""OLMoE (Muennighoff et al. 2024): 64 small experts, of which each token goes to eight, and norms of the whole query
and key."""

from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families import llama, qwen_moe
from lit_gpt.families.fields import tiny_size
from lit_gpt.families.tables import Layout, Said
from lit_gpt.model.config import Config

MODEL_TYPES = ("olmoe",)
# What transformers takes for fields that a config.json leaves out.
DEFAULTS = {"olmoe": dict(max_position_embeddings=4096)}

_7B = llama.preset(
    16, 16, 16, 2048, 1024, 50304, model_type="olmoe", max_position_embeddings=4096, rms_norm_eps=1e-5,
    num_experts=64, num_experts_per_tok=8, norm_topk_prob=False,
)  # fmt: skip
PRESETS = {"OLMoE-1B-7B-0924": _7B, "OLMoE-1B-7B-0924-Instruct": _7B}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    return llama.config({"rms_norm_eps": 1e-5} | hf) | {
        "clip_qkv": hf.get("clip_qkv"),
        "qk_norm": "projection",
        "mlp_class": "MoE",
        "n_expert": hf.get("num_experts") or hf["num_local_experts"],
        "n_expert_per_token": hf.get("num_experts_per_tok", 8),
        "norm_expert_weights": hf.get("norm_topk_prob", False),
    }


weights = qwen_moe.weights


ARCHITECTURES = ("olmoe",)


def gguf(config: Config) -> Layout:
    if config.norm_expert_weights or config.clip_qkv:
        raise UserError("--format gguf: llama.cpp's olmoe clips nothing, and leaves the weights of experts as they are")
    if config.n_query_groups != config.n_head:
        raise UserError("--format gguf: llama.cpp's olmoe has a key and value for each head")
    return Layout("olmoe")


def from_gguf(said: Said) -> dict[str, Any]:
    return {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "num_experts": said.need("expert_count", int),
        "num_experts_per_tok": said.need("expert_used_count", int),
        "norm_topk_prob": False,
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import OlmoeConfig

    own: dict[str, Any] = dict(
        intermediate_size=24, num_key_value_heads=2, num_experts=6, num_experts_per_tok=3, clip_qkv=2.0,
        pad_token_id=None, eos_token_id=2,
    )  # fmt: skip
    return {"olmoe": OlmoeConfig(**tiny_size(**own | fields))}
