"""Ministral 8B (Mistral AI 2024) and Ministral 3 (2025): Mistral with a window in some layers, or stretched by YaRN
with queries that grow beyond the original context."""

from functools import partial
from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families import llama
from lit_gpt.families.fields import rope, tiny_size, windows
from lit_gpt.families.tables import Layout, Said
from lit_gpt.model.config import Config

MODEL_TYPES = ("ministral", "ministral3")
# What transformers takes for fields that a config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "ministral": dict(max_position_embeddings=131072, num_key_value_heads=8, rms_norm_eps=1e-06),
    "ministral3": dict(max_position_embeddings=262144, num_key_value_heads=8, head_dim=128),
}

_YARN: dict[str, Any] = dict(
    rope_type="yarn", rope_theta=1e6, factor=16.0, original_max_position_embeddings=16384, beta_fast=32.0,
    beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1,
)  # fmt: skip
_3 = partial(llama.preset, model_type="ministral3", vocab=131072, head_dim=128, max_position_embeddings=262144,
             rms_norm_eps=1e-5, rope_parameters=_YARN)  # fmt: skip
PRESETS = {
    "Ministral-3-3B-Instruct-2512": _3(26, 32, 8, 3072, 9216, tie_word_embeddings=True),
    "Ministral-3-8B-Instruct-2512": _3(34, 32, 8, 4096, 14336),
    "Ministral-3-14B-Instruct-2512": _3(40, 32, 8, 5120, 16384),
}


def config(hf: dict[str, Any]) -> dict[str, Any]:
    common = llama.config({"rms_norm_eps": 1e-5} | hf)
    if hf["model_type"] == "ministral":
        kind = "full_attention" if hf.get("sliding_window", 4096) is None else "sliding_attention"
        return common | windows({"sliding_window": 4096} | hf, [kind] * hf["num_hidden_layers"])
    fields = {"rope_parameters": hf.get("rope_scaling") or hf["rope_parameters"]}
    scaling = fields["rope_parameters"]
    return common | {
        "sliding_window": hf.get("sliding_window"),
        "query_growth": scaling["llama_4_scaling_beta"],
        "query_growth_length": scaling["original_max_position_embeddings"],
        **rope(hf | fields),
    }


weights = llama.weights


ARCHITECTURES = ("mistral3",)
MSCALES = ("mscale", "mscale_all_dim")


def gguf(config: Config) -> Layout:
    scaling = config.rope_scaling or {}
    log_multiplier, growth = scaling.get("mscale_all_dim"), config.query_growth
    if not growth or config.query_growth_length != scaling.get("original_max_position_embeddings"):
        raise UserError("--format gguf: llama.cpp's mistral3 scales queries beyond the original context of YaRN")
    if log_multiplier != scaling.get("mscale") or config.sliding_window:
        raise UserError("--format gguf: llama.cpp's mistral3 has no window, and YaRN whose mscale is that of all dims")
    own = {"attention.temperature_scale": growth, "rope.scaling.yarn_log_multiplier": log_multiplier}
    return Layout("mistral3", interleaved=True, scaling=(*MSCALES, "llama_4_scaling_beta"), metadata=own)


def from_gguf(said: Said) -> dict[str, Any]:
    scaling = said.rope_scaling or {}
    own = dict.fromkeys(MSCALES, said.get("rope.scaling.yarn_log_multiplier", float, 1.0))
    own |= {"llama_4_scaling_beta": said.need("attention.temperature_scale", float)}
    return {
        "architectures": ["Ministral3ForCausalLM"],
        "model_type": "ministral3",
        "rope_scaling": None,
        "rope_parameters": scaling | own | {"rope_theta": said.get("rope.freq_base", float, 1e4)},
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import Ministral3Config, MinistralConfig

    size = tiny_size(**dict(num_key_value_heads=2, head_dim=16, pad_token_id=None) | fields)
    yarn = _YARN | {"factor": 4.0, "original_max_position_embeddings": 16}
    kinds = ["sliding_attention", "full_attention"]
    return {
        "ministral": MinistralConfig(**size, sliding_window=5, layer_types=kinds),
        "ministral3": Ministral3Config(**size, rope_parameters=yarn),
    }
