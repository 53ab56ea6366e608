"""Read and write checkpoints: mapped from the file, atomic, strict, and without running any code they hold.

A checkpoint folder holds the Hugging Face files as downloaded (config.json, the tokenizer's) and, once converted,
`lit_model.pth` (the GPT's state dict), `lit_config.json` and `prompt_style.json`; if scripts/quantize.py wrote it, also
`lit_quantize.json`, which says how.
"""

import errno
import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_gpt.checkpoints.outline import unreadable
from lit_gpt.errors import UserError
from lit_gpt.files import atomic, refuse_folder

SAFETENSORS = {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8"}  # the names of dtypes in such files


def save(path: Path, contents: dict[str, Any]) -> None:
    """Write a dictionary by torch.save, whole or not at all."""
    with atomic(path) as temporary, named_write_errors(path):
        torch.save(contents, temporary)


@contextmanager
def named_write_errors(path: Path) -> Iterator[None]:
    """Raise UserError with the file's name where torch.save, which raises RuntimeError, cannot write it."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"{path}: could not be written; is the disk full? ({error})") from None


def save_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all."""
    with atomic(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError:
            raise UserError(f"{path}: could not be written; is the disk full?") from None
        temporary.chmod(0o644)  # safetensors makes it the owner's alone


def save_safetensors_streamed(
    path: Path, layout: Mapping[str, Tensor], contents: Mapping[str, Iterable[bytes | memoryview]]
) -> None:
    """Write a safetensors file of tensors whose bytes come piece by piece, whole or not at all.

    Args:
        layout: tensors of the shapes and dtypes to write, on the meta device, those of the widest numbers first.
        contents: the bytes of each tensor, by its name.
    """
    header, end = {}, 0
    for name, tensor in layout.items():
        header[name] = {"dtype": SAFETENSORS[tensor.dtype], "shape": list(tensor.shape)}
        header[name]["data_offsets"] = [end, end := end + tensor.nbytes]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in layout:
            file.writelines(contents[name])
        assert file.tell() == 8 + len(text) + end, "the contents are not of the layout's size"


def load(path: Path, mmap: bool = True) -> dict[str, Any]:
    """Return the contents of a file written by torch.save, with tensors mapped from the file. No code in it is run.

    Raises:
        UserError: the file is missing, truncated, or holds anything but tensors and plain values.
    """
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except PermissionError:
        raise UserError(f"{path}: may not be read") from None
    except Exception as error:  # a damaged file can make its reader fail in any way
        refuse_folder(path, "a file of tensors", "lit_model_*finetuned.pth")
        if "Cannot allocate memory" in str(error):  # to map it to
            raise MemoryError(str(error)) from None
        reason = "it holds code, which is never run" if "Weights only load failed" in str(error) else "is it truncated?"
        raise UserError(unreadable(path, reason)) from None
    if not isinstance(contents, dict):
        raise UserError(f"{path}: expected a dictionary of tensors, found {type(contents).__name__}")
    return contents


def write_streamed(path: Path, layout: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a state dict whose tensors come one by one, holding one at a time in memory.

    The file is laid out first, with room for every tensor, then mapped and filled.

    Args:
        layout: tensors of the shapes and dtypes to write; only these are looked at, so they may be on the meta device.
        tensors: name and contents of each.
    """
    with atomic(path) as temporary:
        with FakeTensorMode():
            empty = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in layout.items()}
        with named_write_errors(path), torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(empty, temporary)
        reserve_disk(temporary)
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):  # what is written goes to the file
            state = torch.load(temporary, weights_only=True, mmap=True)
        for name, tensor in tensors:
            state[name].copy_(tensor)


def reserve_disk(sparse: Path) -> None:
    """Claim a laid-out file's space: a mapped file that meets a full disk kills the process.

    Raises:
        UserError: the disk is too full.
    """
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    with open(sparse, "rb+") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                return  # a file system that cannot claim space
            raise UserError(
                f"{sparse.parent}: no room for {sparse.stat().st_size / 1e9:.1f} GB ({error.strerror})"
            ) from None


def check_state(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: Path | str) -> None:
    """Refuse a state dict that is not exactly what a model expects.

    Raises:
        UserError: names up to three offending tensors.
    """
    problems = [f"lacks {name}" for name in expected if name not in state]
    problems += [f"holds unexpected {name}" for name in state if name not in expected]
    problems += [
        f"has {name} as {tuple(state[name].shape)} where {tuple(tensor.shape)} is expected"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{source}: does not fit the model: {'; '.join(problems[:3])}{more}")
