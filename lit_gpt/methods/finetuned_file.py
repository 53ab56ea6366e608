"""The file that a finetune leaves: what was trained, its settings, and the fingerprint of its base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_gpt.checkpoints.io import check_state, load, save
from lit_gpt.checkpoints.outline import FORMAT_VERSION, check_record
from lit_gpt.distributed import deepspeed
from lit_gpt.distributed.whole import gather, shard_like
from lit_gpt.errors import UserError
from lit_gpt.files import read_json


def file_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what a finetuned file holds, by name: what trains, and what attached modules name in `kept_parameters`.

    The latter is frozen, but cannot be had from the base again, such as a random matrix.
    """
    kept = {
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules()
        for name in getattr(module, "kept_parameters", ())
    }
    return {name: p for name, p in model.named_parameters() if p.requires_grad or name in kept}


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return what a finetuned file holds, each tensor whole. All ranks must ask together."""
    return {name: gather(p).detach() for name, p in file_parameters(model).items()}


def load_trained(model: nn.Module, state: Mapping[str, Tensor], source: Path | str) -> None:
    """Copy a finetuned file's tensors into the parameters that it holds.

    Raises:
        UserError: the names or shapes differ.
    """
    parameters = file_parameters(model)
    check_state(parameters, state, source)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if deepspeed.is_partitioned(parameter):
                deepspeed.set_full(parameter, state[name])
            else:
                parameter.copy_(shard_like(parameter, state[name]))


def file_contents(method: str, base: str, state: Mapping[str, Tensor], **record: Any) -> dict[str, Any]:
    """Return the contents of a finetuned file: what was trained, and all that is needed to use it on its base alone.

    Args:
        method: the method's name.
        base: fingerprint of the base.
        record: hyperparameters, prompt style, and how the base was quantized.
    """
    contents = {"format_version": FORMAT_VERSION, "method": method, "base": base, **record}
    return {**contents, "state": {name: tensor.cpu().contiguous() for name, tensor in state.items()}}


def save_file(path: Path, method: str, base: str, state: Mapping[str, Tensor], **record: Any) -> None:
    """Write a finetuned file, whole or not at all."""
    save(path, file_contents(method, base, state, **record))


def read_file(path: Path, method: str | None, base: str, mmap: bool = True) -> dict[str, Any]:
    """Read a finetuned file, and return its contents.

    Args:
        method: name of the only method to admit; None: any.
        base: fingerprint of the base that it must have been trained on.
        mmap: whether its tensors are mapped from the file, which must then stay as it is.

    Raises:
        UserError: not such a file, of another method or format version, or trained on another base.
    """
    contents = load(path, mmap)
    check_record(contents, path, method)
    if contents["base"] != base:
        run = read_json(Path(path).with_name("hyperparameters.json"), missing_ok=True)
        given = f"; its run was given --checkpoint_dir {run['checkpoint_dir']}" if "checkpoint_dir" in run else ""
        raise UserError(
            f"{path}: trained on another base (fingerprint {contents['base']}) than that of --checkpoint_dir ({base})"
            f"{given}"
        )
    return contents
