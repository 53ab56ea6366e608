"""Find the family of a model, and the presets of all."""

import difflib
import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

from lit_gpt import families as package
from lit_gpt.errors import UserError
from lit_gpt.model.config import Config

SHARED = {"registry", "fields", "tables"}  # modules of this package that are not families
# Architectures that people ask for, and what the model here would have to learn for them.
_INDEXER = "its tokens attend to those that an indexer chooses (DeepSeek sparse attention)"
REFUSED = {
    "deepseek_v32": _INDEXER,
    "glm_moe_dsa": _INDEXER,
}


def families() -> Iterator[ModuleType]:
    """Yield every family: each module of this package but the shared ones."""
    for module in pkgutil.iter_modules(package.__path__):
        if module.name not in SHARED:
            yield importlib.import_module(f"{package.__name__}.{module.name}")


def family_of(hf: dict[str, Any]) -> ModuleType:
    """Return the family that answers to the `model_type` of a config.json.

    Raises:
        UserError: none does.
    """
    kind = hf.get("model_type")
    if kind in REFUSED:
        raise UserError(f"config.json: model_type '{kind}' is not supported: {REFUSED[kind]}; take another model")
    known = {model_type: family for family in families() for model_type in family.MODEL_TYPES}
    if kind not in known:
        raise UserError(
            f"config.json: model_type '{kind}' is not supported; expected one of {', '.join(sorted(known))} "
            "(CONTRIBUTING.md: how to add a family)"
        )
    return known[kind]


def language_model(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of the language model, where a config.json describes other towers besides."""
    if hf.get("model_type") not in {kind for family in families() for kind in getattr(family, "WRAPPERS", ())}:
        return hf
    outer = {name: hf[name] for name in ("tie_word_embeddings",) if name in hf}
    return hf["text_config"] | outer  # it is the whole model that ties its head


def preset(name: str) -> dict[str, Any]:
    """Return the fields of config.json of a published size.

    Raises:
        UserError: no such preset; the nearest are suggested.
    """
    presets = {key: fields for family in families() for key, fields in family.PRESETS.items()}
    if name not in presets:
        lower = {other.lower(): other for other in presets}
        near = [other for other in lower if other.startswith(name.lower())]
        near = (near or difflib.get_close_matches(name.lower(), lower, n=4, cutoff=0.5))[:4]
        some = f"expected one of {len(presets)} published sizes, such as {', '.join(list(presets)[::25])}"
        mend = f"did you mean {' or '.join(lower[other] for other in near)}?" if near else some
        raise UserError(f"unknown model '{name}'; {mend}")
    return presets[name]


def family_of_config(config: Config) -> ModuleType:
    """Return the family that a Config names."""
    return importlib.import_module(f"{package.__name__}.{config.family}")


def config_from_hf(hf: dict[str, Any], name: str = "") -> Config:
    """Make the Config for the contents of a Hugging Face `config.json`.

    Raises:
        UserError: no family answers to the architecture, or the model uses a feature that is not supported.
    """
    hf = language_model(hf)
    family = family_of(hf)
    hf = getattr(family, "DEFAULTS", {}).get(hf["model_type"], {}) | hf
    try:
        values = family.config(hf)
    except KeyError as missing:
        raise UserError(f"config.json: model_type '{hf['model_type']}' needs the field {missing}") from None
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"config.json: a field holds what model_type '{hf['model_type']}' cannot ({error})") from None
    return Config(name=name or hf["model_type"], family=family.__name__.rpartition(".")[2], **values)


def config_from_name(name: str, **overrides: Any) -> Config:
    """Make the Config of a published size, such as "falcon-7b"; no weights needed. `overrides` replace fields."""
    return replace(config_from_hf(preset(name), name=name), **overrides)
