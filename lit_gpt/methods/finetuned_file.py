"""The file that a finetune leaves: what was trained, its settings, and the fingerprint of its base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_gpt.checkpoints.base_model import BaseCheckpoint
from lit_gpt.checkpoints.io import check_state, load, save
from lit_gpt.distributed import deepspeed
from lit_gpt.distributed.sharding import gather, shard_like
from lit_gpt.errors import UserError
from lit_gpt.methods.method import METHODS, method_module
from lit_gpt.model.gpt import GPT

FORMAT_VERSION = 1
RECORD = {"format_version", "method", "base", "state", "hyperparameters", "prompt_style"}


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What trains: the only tensors that a finetuned file holds."""
    return {name: gather(p).detach() for name, p in model.named_parameters() if p.requires_grad}


def load_trained(model: nn.Module, state: Mapping[str, Tensor], source: Path | str) -> None:
    """Copy a finetuned file's tensors into the parameters that train.

    Raises:
        UserError: the names or shapes differ.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check_state(parameters, state, source)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if deepspeed.is_partitioned(parameter):
                deepspeed.set_full(parameter, state[name])
            else:
                parameter.copy_(shard_like(parameter, state[name]))


def file_contents(method: str, base: str, state: Mapping[str, Tensor], **record: Any) -> dict[str, Any]:
    """What was trained, with all that is needed to use it on its base, of that fingerprint, and on no other."""
    contents = {"format_version": FORMAT_VERSION, "method": method, "base": base, **record}
    return {**contents, "state": {name: tensor.cpu().contiguous() for name, tensor in state.items()}}


def save_file(path: Path, method: str, base: str, state: Mapping[str, Tensor], **record: Any) -> None:
    save(path, file_contents(method, base, state, **record))


def read_file(path: Path, method: str | None, base: str) -> dict[str, Any]:
    """The contents of a finetuned file; method None admits any.

    Raises:
        UserError: not such a file, of another method or format version, or trained on another base.
    """
    contents = load(path)
    if not contents.keys() >= RECORD:
        raise UserError(f"{path}: not a finetuned file; expected what finetune/{method or METHODS[0]}.py writes")
    if contents["format_version"] != FORMAT_VERSION:
        raise UserError(f"{path}: format version {contents['format_version']}, expected {FORMAT_VERSION}")
    admitted = (method,) if method else METHODS
    if contents["method"] not in admitted:
        raise UserError(f"{path}: trained by the method {contents['method']}, expected {' or '.join(admitted)}")
    if contents["base"] != base:
        raise UserError(
            f"{path}: trained on another base (fingerprint {contents['base']}) than that of --checkpoint_dir ({base})"
        )
    return contents


def attach_file(model: nn.Module, path: Path, method: str | None, base: str) -> dict[str, Any]:
    """Attach what a finetuned file holds to `model`, which must be the base that it was trained on.

    Args:
        base: the fingerprint of the base's state dict.

    Returns:
        The file's record: hyperparameters, prompt style and so on.

    Raises:
        UserError: as `read_file`, or the file's tensors contradict its own hyperparameters.
    """
    record = read_file(path, method, base)
    attach_record(model, path, record)
    return record


def attach_record(model: nn.Module, path: Path, record: dict[str, Any]) -> None:
    """Attach what `read_file` found; errors as `attach_file`'s."""
    method_module(record["method"]).attach(model, hyperparameters(record, path))
    load_trained(model, record["state"], path)


def hyperparameters(record: dict[str, Any], path: Path) -> Any:
    """Of the method whose file `read_file` has read; errors as `attach_file`'s."""
    try:
        return method_module(record["method"]).CONFIG(**record["hyperparameters"])
    except TypeError as error:
        raise UserError(f"{path}: not the hyperparameters of a {record['method']} file ({error})") from None


def load_finetuned(
    checkpoint_dir: Path,
    path: Path,
    method: str | None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    quantize: str | None = None,
) -> tuple[GPT, dict[str, Any]]:
    """The model of a converted checkpoint with what a finetuned file holds attached, and the file's record.

    Args:
        quantize: a format for the base. None: that which the file was trained on.

    Raises:
        UserError: as `attach_file`, or the base is quantized in another way than the one that was trained on.
    """
    base = BaseCheckpoint.of(checkpoint_dir, quantize)
    record = read_file(path, method, base.fingerprint)
    base = base.quantized_as(record.get("quantize"), path)
    model = base.build(dtype, device)
    attach_record(model, path, record)
    return model.eval(), record
