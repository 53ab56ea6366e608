"""Read and write PEFT's LoRA adapters: `adapter_config.json` with `adapter_model.safetensors`."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lit_gpt.checkpoints import io
from lit_gpt.conversion import weights
from lit_gpt.conversion.peft.layout import (
    Layer,
    Pairs,
    Part,
    lay_out,
    lay_out_magnitudes,
    layers,
    lora_switches,
    split,
    to_magnitudes,
    to_peft,
)
from lit_gpt.errors import UserError
from lit_gpt.files import read_json
from lit_gpt.methods import lora
from lit_gpt.model.config import Config
from lit_gpt.model.gpt import GPT

CONFIG, TENSORS, OLD_TENSORS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
NO_ADAPTER = (
    "{}: no adapter; expected adapter_model.safetensors beside adapter_config.json, as PEFT's save_pretrained writes"
)
PREFIX = "base_model.model."  # what PEFT puts before the names of transformers
MAGNITUDE = "lora_magnitude_vector"  # DoRA's lengths of rows, one of which a layer has beside its pair


def write(folder: Path, model: GPT, config: lora.LoRAConfig, base_model: str) -> None:
    """Write what `PeftModel.from_pretrained(base, folder)` loads.

    Args:
        config: the hyperparameters with which LoRA is attached to `model`.
        base_model: the base's path, or its name on the hub.

    Raises:
        UserError: an adapter has no place for what was trained.
    """
    for flag in config.parts.flags:
        raise UserError(f"{flag}: a PEFT adapter of LoRA has no place for that; merge it by scripts/merge_lora.py")
    if config.update == "glora":
        raise UserError(
            "--lora_update glora: scales the base's weights, for which LoRA's adapter has no place; merge it"
        )
    pairs = to_peft(model, config.scale)
    tensors = {f"{PREFIX}{name}.lora_{x}.weight": t for name, pair in pairs.items() for x, t in zip("AB", pair)}  # noqa: B905
    magnitudes = {name: tensor for name, tensor in to_magnitudes(model).items() if name in pairs}
    tensors |= {f"{PREFIX}{name}.{MAGNITUDE}": tensor for name, tensor in magnitudes.items()}
    tensors = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    io.save_safetensors(folder / TENSORS, tensors, {"format": "pt"})
    contents = adapter_config(model.config, pairs, config) | {"base_model_name_or_path": base_model}
    (folder / CONFIG).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def adapter_config(model: Config, pairs: Pairs, config: lora.LoRAConfig) -> dict[str, Any]:
    """Return the contents of adapter_config.json.

    Every layer is scaled by alpha / r, whatever its rank. `r` is the largest rank, by which readers reserve room;
    layers of a smaller one are listed.
    """
    names = {name.rpartition(".")[0] for row in weights.rows(model) for name in row.hf} | set(pairs)
    ranks = {name: len(A) for name, (A, _) in pairs.items()}
    r = max(ranks.values())
    smaller = {shortest(name, {n for n in ranks if ranks[n] == k}, names): k for name, k in ranks.items() if k != r}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": r,
        "lora_alpha": whole_if_possible(config.scale * r),
        "lora_dropout": config.dropout,
        "target_modules": sorted({shortest(name, set(pairs), names) for name in pairs}),
        "rank_pattern": smaller,
        "alpha_pattern": {key: whole_if_possible(config.scale * k) for key, k in smaller.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": config.update == "dora",
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def shortest(name: str, wanted: set[str], names: set[str]) -> str:
    """Return the shortest end of a layer's name that among `names` only those in `wanted` have."""
    parts = name.split(".")
    for n in range(1, len(parts)):
        end = ".".join(parts[-n:])
        if all(other in wanted for other in names if other == end or other.endswith("." + end)):
            return end
    return name


def whole_if_possible(value: float) -> float:
    """Return a whole number, up to the rounding of floats, as an int."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value


# Fields of adapter_config.json that `check_config` and `Targets` read, and those that say nothing about the function.
READ = {
    "peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "bias",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "init_lora_weights",
}  # fmt: skip
SAY_NOTHING = {
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "megatron_core",
    "qalora_group_size", "runtime_config", "eva_config",
}  # fmt: skip
NAMED_ADAPTER = re.compile(r"\.lora_[AB]\.([^.]+)\.weight$")
KEPT_BASE = (True, False, None, "gaussian", "orthogonal", "eva")  # initializations that leave the base as it was


def read(
    folder: Path, config: Config, base: Mapping[str, Tensor]
) -> tuple[lora.LoRAConfig, dict[str, Tensor], list[str]]:
    """Read a PEFT adapter for a model of this Config, whose state dict is `base`.

    A module's own alpha and rank are respected: what its scale differs by goes into its B, and ranks that it
    lacks are zeros in A and B, which add nothing and, their gradients being zero, never train. So are the projections
    that the adapter leaves out in layers of which it adapts others.

    Returns:
        the hyperparameters, the state dict of the LoRA parameters in float32, and remarks to show.

    Raises:
        UserError: the folder is no LoRA adapter, or has what cannot be taken over; the field or tensor is named.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise UserError(NO_ADAPTER.format(folder))
    fields = read_json(path)
    check_config(fields, path)
    known = {layer.name: layer for layer in layers(config)}
    modules = {layer.stored: layer.name for layer in known.values()}
    pairs, others = read_pairs(Path(folder))
    magnitudes = {
        modules.get(name, name): others.pop(f"{name}.{MAGNITUDE}").float()
        for name in pairs
        if fields.get("use_dora") and f"{name}.{MAGNITUDE}" in others
    }
    check_magnitudes(magnitudes, pairs, fields, modules, Path(folder))
    pairs = {modules.get(name, name): pair for name, pair in pairs.items()}
    check_others(others, known, config, base, Path(folder))
    targets = Targets(fields, path)
    check_targets(pairs, known, targets, Path(folder))

    switches = lora_switches(config)
    updates: dict[Part, tuple[Tensor, Tensor, float]] = {}
    for name, (A, B) in pairs.items():
        layer, scale = known[name], targets.scale(known[name], len(A))
        for span, a, b in split(layer, A, B, [span for lit, span in switches if lit == layer.lit], folder):
            updates[layer.lit, span] = a, b, scale
    settings = settings_of(fields, updates, switches, bool(magnitudes))
    state = lay_out(config, settings, updates)
    if magnitudes:
        state |= lay_out_magnitudes(config, settings, magnitudes, base)
    return settings, state, targets.remarks(known)


def settings_of(
    fields: dict[str, Any],
    updates: Mapping[Part, tuple[Tensor, Tensor, float]],
    switches: Mapping[Part, str],
    dora: bool,
) -> lora.LoRAConfig:
    """Return the hyperparameters under which updates of several ranks and scales have room."""
    r = max(len(a) for a, _, _ in updates.values())
    default = fields["lora_alpha"] / (math.sqrt(fields["r"]) if fields.get("use_rslora") else fields["r"])
    adapted: dict[str, Any] = {name: any(switches[part] == name for part in updates) for name in set(switches.values())}
    return lora.LoRAConfig(
        r=r,
        alpha=whole_if_possible(default * r),
        dropout=fields.get("lora_dropout") or 0.0,
        update="dora" if dora else "plain",
        **adapted,
    )


def check_magnitudes(
    magnitudes: Mapping[str, Tensor], pairs: Pairs, fields: Mapping[str, Any], modules: Mapping[str, str], folder: Path
) -> None:
    """Refuse a DoRA adapter that lacks the magnitudes of a layer or has them in another shape."""
    for name, (_, B) in pairs.items() if fields.get("use_dora") else ():
        found = magnitudes.get(modules.get(name, name))
        if found is None or found.shape != (len(B),):
            shape = None if found is None else tuple(found.shape)
            raise UserError(f"{folder}: of {name}.{MAGNITUDE} it holds {shape}; expected ({len(B)},), as use_dora says")


def check_config(fields: Mapping[str, Any], path: Path) -> None:
    """Refuse, by its name, a field that would change what the adapter computes and is not respected."""

    def refuse(name: str, why: str) -> None:
        raise UserError(f"{path}: '{name}': {json.dumps(fields.get(name))} {why}")

    if fields.get("peft_type") != "LORA":
        refuse("peft_type", "is not supported; expected LORA")
    if fields.get("task_type") not in (None, "CAUSAL_LM"):
        refuse("task_type", "is not supported; expected CAUSAL_LM")
    if fields.get("bias", "none") != "none":
        refuse("bias", "is not supported: only matrices have updates; expected none")
    if fields.get("init_lora_weights", True) not in KEPT_BASE:
        refuse(
            "init_lora_weights", "is not supported: it changes the base's weights; save the adapter converted to LoRA"
        )
    for name in ("r", "lora_alpha"):
        if isinstance(fields.get(name), bool) or not isinstance(fields.get(name), (int, float)) or fields[name] <= 0:
            refuse(name, "is not a number above 0")
    for name, value in fields.items():
        if name not in READ | SAY_NOTHING and value not in (None, False, "", [], {}):
            refuse(name, "is not supported; merge the adapter with PEFT (merge_and_unload) and convert the result")


def read_pairs(folder: Path) -> tuple[Pairs, dict[str, Tensor]]:
    """Read an adapter's pairs of A and B, and its other tensors, by the names of transformers.

    Raises:
        UserError: there are no pairs, or halves of them.
    """
    path = folder / TENSORS
    if path.is_file():
        try:
            tensors = load_file(path)
        except Exception as error:  # SafetensorError, OSError: a damaged file
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    elif (folder / OLD_TENSORS).is_file():
        path = folder / OLD_TENSORS
        tensors = io.load(path)
    else:
        raise UserError(NO_ADAPTER.format(folder))
    halves: dict[str, dict[str, Tensor]] = {}
    others = {}
    for name, tensor in tensors.items():
        key = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if key and tensor.ndim == 2:
            halves.setdefault(key[1], {})[key[2]] = tensor.float()
        else:
            others[name.removeprefix(PREFIX)] = tensor
    if not halves and (named := next(filter(None, map(NAMED_ADAPTER.search, tensors)), None)):
        raise UserError(
            f"{path}: its tensors carry an adapter's name, '{named[1]}', as in the state dict of a PeftModel; write it "
            "by save_pretrained"
        )
    if not halves:
        names = ", ".join([*tensors][:3]) or "none at all"
        raise UserError(f"{path}: holds no tensors lora_A and lora_B of LoRA; found {names}")
    for name, pair in halves.items():
        if len(pair) != 2 or len(pair["A"]) != pair["B"].shape[1]:
            shapes = ", ".join(f"{x} {tuple(t.shape)}" for x, t in pair.items())
            raise UserError(f"{path}: of {name} it holds {shapes}; expected A (r, in) and B (out, r)")
    return {name: (pair["A"], pair["B"]) for name, pair in halves.items()}, others


def check_others(
    others: Mapping[str, Tensor], known: Mapping[str, Layer], config: Config, base: Mapping[str, Tensor], folder: Path
) -> None:
    """Refuse what is neither A nor B, but for copies of the base's own weights: PEFT adds those of an adapted head."""
    rows = {row.lit: row for row in weights.rows(replace(config, tie_embeddings=False))}
    for name, tensor in others.items():
        layer = known.get(re.sub(r"(\.base_layer)?\.weight$", "", name))
        if layer is None:
            raise UserError(f"{folder}: holds {name} {tuple(tensor.shape)}, no A or B of LoRA; it is not supported")
        row, stored = rows[f"{layer.lit}.weight"], base.get(f"{layer.lit}.weight", base["wte.weight"])
        own = row.place.to_hf(stored)[row.hf.index(f"{layer.stored}.weight")]
        if own.shape != tensor.shape or not torch.equal(own.to(tensor.dtype), tensor):
            raise UserError(f"{folder}: changes the base's {name}; only updates of low rank are supported")


@dataclass(frozen=True)
class Targets:
    """The layers that an adapter_config.json is for, by the rules of PEFT, and the scale of each."""

    fields: Mapping[str, Any]
    path: Path

    def __contains__(self, layer: Layer) -> bool:
        return any(self.has(name) for name in (layer.name, layer.stored))

    def has(self, name: str) -> bool:
        wanted, excluded = self.fields.get("target_modules"), self.fields.get("exclude_modules")
        if excluded and named(name, excluded):
            return False
        if wanted is None or wanted == "all-linear":
            return True
        only = self.fields.get("layers_to_transform")
        if only is None or isinstance(wanted, str):
            return named(name, wanted)
        patterns = self.fields.get("layers_pattern") or r"[^.]*"
        patterns = [patterns] if isinstance(patterns, str) else patterns
        layer = next((m for p in patterns if (m := re.match(rf".*\.{p}\.(\d+)\.", name))), None)
        only = [only] if isinstance(only, int) else only
        return named(name, wanted) and layer is not None and int(layer[1]) in only

    def own_value(self, pattern: str, layer: Layer, default: float) -> float:
        """Return a layer's own value in `rank_pattern` or `alpha_pattern`, else the default."""
        own, names = self.fields.get(pattern) or {}, (layer.name, layer.stored)
        return next((v for key, v in own.items() if any(re.match(rf"(.*\.)?({key})$", n) for n in names)), default)

    def scale(self, layer: Layer, rank: int) -> float:
        """Return the factor of the layer's B A; refuse a rank other than the stated one."""
        stated = self.own_value("rank_pattern", layer, self.fields["r"])
        if stated != rank:
            raise UserError(f"{self.path}: states rank {stated} for {layer.name}, whose A has {rank} rows")
        alpha = self.own_value("alpha_pattern", layer, self.fields["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def remarks(self, known: Mapping[str, Layer]) -> list[str]:
        """Return a line for each target that names no layer of the model; PEFT passes over them too."""
        wanted = self.fields.get("target_modules")
        names = [name for layer in known.values() for name in (layer.name, layer.stored)]
        idle = [end for end in wanted or () if not any(named(name, [end]) for name in names)]
        return [f"target_modules: the model has no {end}" for end in idle] if isinstance(wanted, list) else []


def named(name: str, targets: str | list[str]) -> bool:
    """Decide by PEFT's rule: a regular expression of the whole name, or a list of names and their ends."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == end or name.endswith("." + end) for end in targets)


def check_targets(pairs: Pairs, known: Mapping[str, Layer], targets: Targets, folder: Path) -> None:
    """Refuse an adapter for layers that the model has not, and tensors that its own configuration contradicts."""
    for name in pairs:
        if name not in known:
            raise UserError(f"{folder}: adapts {name}, and the model has no such layer; is it for another base?")
        if known[name] not in targets:
            raise UserError(f"{targets.path}: does not target {name}, whose A and B the folder holds")
    missing = [name for name, layer in known.items() if layer in targets and name not in pairs and layer.lit != "wte"]
    if missing and targets.fields.get("target_modules") != "all-linear":
        raise UserError(f"{folder}: lacks A and B of {missing[0]}, which {CONFIG} targets; is the file whole?")
