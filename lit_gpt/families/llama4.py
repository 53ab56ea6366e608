"""The language models of Llama 4 (Meta 2025): attention within chunks where there are positions, and everywhere where
there are none; experts, of which each token goes to one, and one that all go to."""

from functools import partial
from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.families import llama
from lit_gpt.families.fields import rope, tiny_size
from lit_gpt.families.tables import AllExperts, Layout, Place, Said, Stacked, Table
from lit_gpt.model.config import Config

MODEL_TYPES = ("llama4_text",)
WRAPPERS = ("llama4",)  # all that are published
# What transformers takes for fields that a config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama4_text": dict(
        vocab_size=202048, hidden_size=5120, intermediate_size=8192, intermediate_size_mlp=16384, num_hidden_layers=48,
        num_attention_heads=40, num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, rms_norm_eps=1e-5,
        num_local_experts=16, num_experts_per_tok=1, attention_chunk_size=8192,
    )
}  # fmt: skip

_preset = partial(
    llama.preset, 48, 40, 8, 5120, 8192, 202048, model_type="llama4_text", intermediate_size_mlp=16384, head_dim=128,
    rms_norm_eps=1e-5, rope_theta=500000.0, num_experts_per_tok=1,
)  # fmt: skip
_SCALING: dict[str, Any] = dict(rope_type="llama3", factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0,
                                original_max_position_embeddings=8192)  # fmt: skip
PRESETS = {
    "Llama-4-Scout-17B-16E": _preset(
        max_position_embeddings=10485760, num_local_experts=16, interleave_moe_layer_step=1, use_qk_norm=True,
        rope_scaling=_SCALING,
    ),
    "Llama-4-Maverick-17B-128E": _preset(
        max_position_embeddings=1048576, num_local_experts=128, interleave_moe_layer_step=2, use_qk_norm=False,
    ),
}  # fmt: skip


def config(hf: dict[str, Any]) -> dict[str, Any]:
    layers = range(hf["num_hidden_layers"])
    unrotated, experts = unrotated_layers(hf), expert_layers(hf)
    return llama.config(hf) | {
        "unrotated_layers": unrotated,
        "attention_chunk": hf.get("attention_chunk_size"),
        "global_layers": global_layers(hf, unrotated),
        "query_growth": hf.get("attn_scale", 0.1) if hf.get("attn_temperature_tuning", True) else None,
        "query_growth_length": hf.get("floor_scale", 8192),
        "query_growth_start": 1,
        "query_growth_unrotated": True,
        "qk_norm": "head" if hf.get("use_qk_norm", True) else None,
        "qk_norm_class": "PlainRMSNorm",
        "qk_norm_rotated": True,
        "mlp_class": "MoE",
        "n_expert": hf["num_local_experts"],
        "n_expert_per_token": hf["num_experts_per_tok"],
        "router_score": "sigmoid",
        "norm_expert_weights": False,
        "weigh_expert_inputs": True,
        "shared_intermediate_size": hf["intermediate_size"],
        "dense_layers": [layer for layer in layers if layer not in experts],
        "dense_intermediate_size": hf["intermediate_size_mlp"],
        **rope({"rope_theta": 500000.0} | hf),
    }


def unrotated_layers(hf: dict[str, Any]) -> list[int]:
    """Return the layers without positions, from a 0 for each among 1s, or from how many layers are between them."""
    layers, period = hf["num_hidden_layers"], hf.get("no_rope_layer_interval", 4)
    rotated = hf.get("no_rope_layers") or [(layer + 1) % period for layer in range(layers)]
    return [layer for layer in range(layers) if not rotated[layer]]


def expert_layers(hf: dict[str, Any]) -> list[int]:
    """Return the layers with experts, listed or from how many layers are between them."""
    listed, step = hf.get("moe_layers"), hf.get("interleave_moe_layer_step", 1)
    return [*range(step - 1, hf["num_hidden_layers"], step)] if listed is None else listed


def global_layers(hf: dict[str, Any], unrotated: list[int]) -> list[int]:
    """Return the layers without chunks.

    Raises:
        UserError: `layer_types` names another kind.
    """
    kinds = hf.get("layer_types")
    if unknown := {*(kinds or ())} - {"full_attention", "chunked_attention"}:
        raise UserError(f"config.json: layer_types {sorted(unknown)} are not supported")
    return [layer for layer, kind in enumerate(kinds) if kind == "full_attention"] if kinds else unrotated


def weights(config: Config) -> Table:
    mlp = "model.layers.{}.feed_forward."
    table: dict[str, str | Place] = {
        **llama.weights(config),
        **llama.turned_qkv(config),
        "h.{}.mlp.router": mlp + "router",
        "h.{}.mlp.gate_up": AllExperts((mlp + "experts.gate_up_proj",)),
        "h.{}.mlp.proj": AllExperts((mlp + "experts.down_proj",)),
    }
    sizes = [("h.{}.mlp.shared.", mlp + "shared_expert.", config.shared_intermediate_size)]
    sizes += [(f"h.{i}.mlp.", mlp.format(i), config.dense_intermediate_size) for i in config.dense_layers]
    for ours, theirs, size in sizes:
        table[ours + "gate_up"] = Stacked((theirs + "gate_proj", theirs + "up_proj"), (size, size))
        table[ours + "proj"] = theirs + "down_proj"
    return table


ARCHITECTURES = ("llama4",)


def gguf(config: Config) -> Layout:
    layers = range(config.n_layer)
    places = config.unrotated_layers, config.global_layers
    if config.attention_chunk != 8192 or any(found != [*layers[3::4]] for found in places):
        raise UserError("--format gguf: llama.cpp's llama4 has chunks of 8192, none and no positions each fourth layer")
    if (config.query_growth, config.query_growth_length) != (0.1, 8192) or config.n_expert_per_token != 1:
        raise UserError("--format gguf: llama.cpp's llama4 scales queries by 0.1 each 8192, and has one expert a token")
    if (config.qk_norm is None) != (config.n_expert == 128):
        raise UserError("--format gguf: llama.cpp's llama4 norms queries and keys unless it has 128 experts")
    step = next((layer + 1 for layer in layers if layer not in config.dense_layers), 0)
    if [layer for layer in layers if layer not in config.dense_layers] != [*layers[step - 1 :: step or 1]]:
        raise UserError("--format gguf: llama.cpp's llama4 has experts in one layer of each so many")
    apart = dict.fromkeys(("expert_shared_feed_forward_length", "leading_dense_block_count"))
    return Layout("llama4", interleaved=True, metadata={"interleave_moe_layer_step": step, **apart})


def from_gguf(said: Said) -> dict[str, Any]:
    experts = said.need("expert_count", int)
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "intermediate_size": said.need("expert_feed_forward_length", int),
        "intermediate_size_mlp": said.need("feed_forward_length", int),
        "interleave_moe_layer_step": said.need("interleave_moe_layer_step", int),
        "num_local_experts": experts,
        "num_experts_per_tok": said.need("expert_used_count", int),
        "use_qk_norm": experts != 128,
    }


def tiny_hf(**fields: Any) -> dict[str, Any]:
    from transformers import Llama4TextConfig

    size = tiny_size(
        **dict(num_key_value_heads=2, head_dim=16, intermediate_size=24, intermediate_size_mlp=40,
               num_local_experts=5, num_hidden_layers=4, no_rope_layer_interval=2, attention_chunk_size=5,
               floor_scale=7, attn_scale=0.5) | fields
    )  # fmt: skip
    dense: dict[str, Any] = dict(
        interleave_moe_layer_step=2, use_qk_norm=False, num_experts_per_tok=2, attn_temperature_tuning=False
    )
    return {"dense layers": Llama4TextConfig(**size | dense), "llama4": Llama4TextConfig(**size)}
