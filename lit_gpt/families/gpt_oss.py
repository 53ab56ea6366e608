"""gpt-oss (OpenAI 2025): experts with clamped gates and biases, a sink for each head, a window in every other layer.

The published experts are stored in 4 bits (MXFP4), and dequantized at conversion.
"""

from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families import llama
from lit_gpt.families.fields import refuse, rope, tiny_size, windows
from lit_gpt.families.tables import AllExperts, Layout, Said, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("gpt_oss",)
# What transformers takes for fields that a config.json leaves out.
DEFAULTS = {"gpt_oss": dict(max_position_embeddings=131072, num_key_value_heads=8)}

_YARN: dict[str, Any] = dict(
    rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False, original_max_position_embeddings=4096
)
_20B = llama.preset(
    24, 64, 8, 2880, 2880, 201088, model_type="gpt_oss", head_dim=64, max_position_embeddings=131072, rms_norm_eps=1e-5,
    rope_theta=150000.0, rope_scaling=_YARN, sliding_window=128, num_local_experts=32, num_experts_per_tok=4,
    attention_bias=True, swiglu_limit=7.0,
)  # fmt: skip
PRESETS = {"gpt-oss-20b": _20B, "gpt-oss-120b": dict(_20B, num_hidden_layers=36, num_local_experts=128)}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    refuse(hf, hidden_act="silu")
    layers = range(hf["num_hidden_layers"])
    kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in layers]
    scaling = hf.get("rope_parameters") or hf.get("rope_scaling") or _YARN
    return llama.config({"head_dim": 64, "rms_norm_eps": 1e-5, "attention_bias": True} | hf) | {
        "attention_sinks": True,
        "mlp_class": "MoE",
        "n_expert": hf.get("num_local_experts") or hf.get("num_experts", 128),
        "n_expert_per_token": hf.get("num_experts_per_tok", 4),
        "router_bias": True,
        "expert_bias": True,
        "gate_limit": hf.get("swiglu_limit", 7.0),
        "gate_slope": hf.get("swiglu_alpha", 1.702),
        **windows({"sliding_window": 128} | hf, kinds),
        **rope({"rope_theta": 150000.0} | hf | {"rope_parameters": None, "rope_scaling": scaling}),
    }


def weights(config: Config) -> Table:
    layer = "model.layers.{}."
    return {
        **llama.weights(config),
        "h.{}.attn": layer + "self_attn",  # its sinks
        "h.{}.mlp.router": layer + "mlp.router",
        "h.{}.mlp.gate_up": AllExperts((layer + "mlp.experts.gate_up_proj",), alternating=True),
        "h.{}.mlp.proj": AllExperts((layer + "mlp.experts.down_proj",)),
    }


ARCHITECTURES = ("gpt-oss",)


def gguf(config: Config) -> Layout:
    if (config.gate_limit, config.gate_slope) != (7.0, 1.702):
        raise UserError("--format gguf: llama.cpp's gpt-oss clamps gates to 7 and has their slope at 1.702")
    if config.global_layers != list(range(1, config.n_layer, 2)):
        raise UserError("--format gguf: llama.cpp's gpt-oss has a window in every other layer, the first among them")
    window = {"attention.sliding_window": config.sliding_window}
    norm = {"h.{}.norm_2": "blk.{}.post_attention_norm"}
    return Layout("gpt-oss", keeps_window=True, rounds_yarn=True, metadata=window, places=norm)


def from_gguf(said: Said) -> dict[str, Any]:
    key = "rope.scaling."
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_local_experts": said.need("expert_count", int),
        "num_experts_per_tok": said.need("expert_used_count", int),
        "sliding_window": said.need("attention.sliding_window", int),
        "rope_scaling": _YARN
        | {
            "factor": said.need(key + "factor", float),
            "original_max_position_embeddings": said.need(key + "original_context_length", int),
        },
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import GptOssConfig

    yarn = _YARN | {"factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
    own: dict[str, Any] = dict(
        intermediate_size=32, num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2,
        sliding_window=5, swiglu_limit=0.5, rope_parameters=yarn,
    )  # fmt: skip
    return {"gpt_oss": GptOssConfig(**tiny_size(**own | fields))}
