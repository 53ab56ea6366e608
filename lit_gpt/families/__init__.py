"""The Hugging Face families. One file each, found by listing this folder; a new family touches nothing else.

A family's file defines

    MODEL_TYPES           the `model_type`s of config.json that it answers to
    PRESETS               {name: fields of config.json} of published sizes, for use without weights
    config(hf)            the fields of lit_gpt.Config for a config.json
    weights(config)       {lit module: where its tensors lie in the Hugging Face file}, run in both directions by
                          lit_gpt.weights
    DERIVED               patterns of stored tensors that the architecture computes and that are not weights
    gguf(config)          how llama.cpp has it: a lit_gpt.gguf_layout.Layout; without it, exports to GGUF are refused
    MODULES               {name of a tensor's module in files: in transformers' model}, where transformers 5 renames it
    tiny_hf(**fields)     a small transformers configuration per layout, for the parity tests
"""

import difflib
import importlib
import json
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from lit_gpt.errors import UserError


def families() -> Iterator[ModuleType]:
    for module in pkgutil.iter_modules(__path__):
        yield importlib.import_module(f"{__name__}.{module.name}")


def family_of(hf: dict[str, Any]) -> ModuleType:
    """The family that answers to the `model_type` of a config.json.

    Raises:
        UserError: none does.
    """
    kind = hf.get("model_type")
    known = {model_type: family for family in families() for model_type in family.MODEL_TYPES}
    if kind not in known:
        raise UserError(
            f"config.json: model_type '{kind}' is not supported; expected one of {', '.join(sorted(known))} "
            "(CONTRIBUTING.md: how to add a family)"
        )
    return known[kind]


def preset(name: str) -> dict[str, Any]:
    """The fields of config.json of a published size.

    Raises:
        UserError: no such preset; the nearest is suggested.
    """
    presets = {key: fields for family in families() for key, fields in family.PRESETS.items()}
    if name not in presets:
        near = difflib.get_close_matches(name, presets, n=1, cutoff=0.4)
        raise UserError(f"unknown model '{name}'" + (f"; did you mean '{near[0]}'?" if near else ""))
    return presets[name]


def family_of_config(config) -> ModuleType:  # a lit_gpt.Config
    return importlib.import_module(f"{__name__}.{config.family}")


def refuse(hf: dict[str, Any], **supported: Any) -> None:
    """Refuse a config.json of which a field asks for what the model does not do. A field that is absent does not.

    Raises:
        UserError: names the field and the only value that is supported.
    """
    for field, value in supported.items():
        if hf.get(field, value) != value:
            found, only = json.dumps(hf[field]), json.dumps(value)
            raise UserError(f"config.json: '{field}': {found} is not supported; expected {only}")


def rope(hf: dict[str, Any], base: str = "rope_theta", percentage: str = "partial_rotary_factor") -> dict[str, Any]:
    """The Config's rotary fields. `rope_parameters` holds them since transformers 5; before, they lay side by side.

    Args:
        base, percentage: how older files of the family call them.
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
    """The Config's fields of a window that only some layers have.

    Args:
        kinds: of each layer "sliding_attention" or "full_attention", for files without `layer_types`.

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


def activation(name: str) -> str:
    """The key of lit_gpt.model.ACTIVATIONS for transformers' name of an activation."""
    return {"swish": "silu", **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_tanh")}.get(
        name, name
    )
