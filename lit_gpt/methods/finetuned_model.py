"""A base with what a finetuned file holds attached to it."""

from pathlib import Path
from typing import Any

import torch

from lit_gpt.checkpoints.base_model import BaseCheckpoint
from lit_gpt.distributed.placement import Where
from lit_gpt.methods import registry
from lit_gpt.methods.finetuned_file import read_file
from lit_gpt.methods.method import Method
from lit_gpt.model.gpt import GPT


def method_of(record: dict[str, Any], path: Path) -> Method:
    """Return the method, with its hyperparameters, of a file that `read_file` has read.

    Raises:
        UserError: the method is not known or not one that attaches to a base, or these are not its hyperparameters.
    """
    return registry.make_method(record["method"], registry.recorded_config(record, path))


def attach_record(model: GPT, path: Path, record: dict[str, Any]) -> Method:
    """Attach what `read_file` has read to the base that it was trained on, and return its method.

    Raises:
        UserError: the file's tensors contradict its own hyperparameters.
    """
    method = method_of(record, path)
    method.attach(model)
    method.load_state(model, record["state"], path)
    return method


def load_finetuned(
    checkpoint_dir: Path,
    path: Path,
    method: str | None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    quantize: str | None = None,
) -> tuple[GPT, dict[str, Any]]:
    """Load a converted checkpoint with a finetuned file attached, in evaluation mode, and the file's record.

    Args:
        method: name of the only method to admit; None: any.
        quantize: a format for the base. None: the one that the file was trained on.

    Raises:
        UserError: the file does not fit the base, or the base is quantized otherwise than when it was trained.
    """
    return build_finetuned(BaseCheckpoint.open(checkpoint_dir, quantize), path, method, dtype, device)


def build_finetuned(
    base: BaseCheckpoint,
    path: Path,
    method: str | None,
    dtype: torch.dtype | None = None,
    device: Where | None = None,
) -> tuple[GPT, dict[str, Any]]:
    """Build an opened base with a finetuned file attached, and return the file's record, too; see `load_finetuned`."""
    record = read_file(path, method, base.fingerprint)
    method_of(record, path)  # before the model takes its time
    model = base.quantized_as(record.get("quantize"), path).build(dtype, device)
    attach_record(model, path, record)
    return model.eval(), record
