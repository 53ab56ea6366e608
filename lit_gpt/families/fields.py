"""The fields of a Hugging Face config.json that several families share: read, refused, and for a tiny model."""

import json
from typing import Any

from lit_gpt.errors import UserError


def refuse(hf: dict[str, Any], **supported: Any) -> None:
    """Refuse a config.json in which a field has another value than the one that is supported; it may be absent.

    Raises:
        UserError: names the field and the only value that is supported.
    """
    for field, value in supported.items():
        if hf.get(field, value) != value:
            given, only = json.dumps(hf[field]), json.dumps(value)
            raise UserError(f"config.json: '{field}': {given} is not supported; expected {only}")


def sizes(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the Config's sizes, from the names that most families have for them."""
    return {
        "n_layer": hf["num_hidden_layers"],
        "n_head": hf["num_attention_heads"],
        "n_embd": hf["hidden_size"],
        "vocab_size": hf["vocab_size"],
        "block_size": hf.get("max_position_embeddings", 2048),
    }


def rope(hf: dict[str, Any], base: str = "rope_theta", percentage: str = "partial_rotary_factor") -> dict[str, Any]:
    """Return the Config's rotary fields.

    `rope_parameters` holds them since transformers 5; before, they lay side by side.

    Args:
        base, percentage: the names of these fields in older files of the family.
    """
    fields = hf.get("rope_parameters") or {**(hf.get("rope_scaling") or {})}
    kind = fields.get("rope_type") or fields.get("type") or "default"
    scaling = {k: v for k, v in fields.items() if k not in ("type", "rope_theta", "partial_rotary_factor")}
    return {
        "rope_base": float(fields.get("rope_theta") or hf.get(base) or 10000.0),
        "rotary_percentage": float(fields.get("partial_rotary_factor") or hf.get(percentage) or 1.0),
        "rope_scaling": None if kind == "default" else {**scaling, "rope_type": kind},
    }


def windows(hf: dict[str, Any], kinds: list[str]) -> dict[str, Any]:
    """Return the Config's fields for a window that only some layers have.

    Args:
        kinds: "sliding_attention" or "full_attention" for each layer, where a file has no `layer_types`.

    Raises:
        UserError: `layer_types` names another kind.
    """
    kinds = hf.get("layer_types") or kinds
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown:
        raise UserError(f"config.json: layer_types {sorted(unknown)} are not supported")
    if "sliding_attention" not in kinds:
        return {"sliding_window": None}
    everywhere = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
    return {"sliding_window": hf["sliding_window"], "global_layers": everywhere}


def two_ropes(
    hf: dict[str, Any], base: float, local_base: float, older_local: str = "rope_local_base_freq"
) -> dict[str, Any]:
    """Return the rotary fields of a Config whose layers with a window have angles of their own, from either spelling.

    Args:
        base, local_base: the family's defaults.
        older_local: the name of the latter in older files.

    Raises:
        UserError: those with the window scale theirs.
    """
    named = hf.get("rope_parameters") or {}
    local = named.get("sliding_attention") or {}
    if local.get("rope_type", "default") != "default":
        raise UserError("config.json: rope_parameters of sliding_attention: expected rope_type 'default'")
    full = rope({"rope_theta": base} | hf | {"rope_parameters": named.get("full_attention")})
    return full | {"local_rope_base": float(local.get("rope_theta") or hf.get(older_local) or local_base)}


def sigmoid_router(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the Config for DeepSeek V3's router: sigmoids with a correction, experts in groups."""
    return {
        "router_score": "sigmoid",
        "router_correction": True,
        "n_expert_group": hf.get("n_group") or 1,
        "n_group_per_token": hf.get("topk_group") or 1,
        "norm_expert_weights": hf.get("norm_topk_prob", True),
        "expert_scale": hf.get("routed_scaling_factor", 1.0),
    }


def activation(name: str) -> str:
    """Return the key of lit_gpt.kernels.functional.ACTIVATIONS for transformers' name of an activation."""
    if name in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"):
        return "gelu_tanh"
    return "silu" if name == "swish" else name


def tiny_size(**fields: Any) -> dict[str, Any]:
    """Return the fields of a small transformers configuration; `fields` add to the common ones or replace them."""
    return dict(
        vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    ) | fields  # fmt: skip
