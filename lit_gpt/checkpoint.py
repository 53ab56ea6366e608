"""Reading and writing checkpoints: mapped from the file, atomic, strict, and without running any code they hold.

A checkpoint folder holds the Hugging Face files as downloaded (config.json, the tokenizer's) and, once converted,
`lit_model.pth` (the GPT's state dict), `lit_config.json` and `prompt_style.json`; if scripts/quantize.py wrote it, also
`lit_quantize.json`, which says how.
"""

import errno
import fcntl
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_gpt.config import Config
from lit_gpt.errors import UserError
from lit_gpt.files import atomic
from lit_gpt.meta import on_meta
from lit_gpt.model import GPT
from lit_gpt.quantize import FORMATS

FORMAT_VERSION = 1
QUANTIZED_VERSION = 1
SAFETENSORS = {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8"}  # the names of dtypes in such files
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_checkpoint_dir(checkpoint_dir: Path, converted: bool = True) -> None:
    """Refuse a folder that is not a checkpoint, saying what is missing, what is there and which command comes next.

    Raises:
        UserError
    """
    folder = Path(checkpoint_dir)
    if not folder.is_dir():
        near = sorted(str(path.parent) for path in Path("checkpoints").glob("*/*/config.json"))
        there = f"; there are {', '.join(near)}" if near else ""
        raise UserError(
            f"--checkpoint_dir {folder}: no such folder{there}; "
            "`python scripts/download.py --repo_id OWNER/NAME` downloads a model"
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--checkpoint_dir {folder}: not a checkpoint folder, config.json is missing; expected what "
            "`python scripts/download.py` leaves"
        )
    if converted and not all((folder / name).is_file() for name in ("lit_model.pth", "lit_config.json")):
        raise UserError(
            f"--checkpoint_dir {folder}: not converted yet; run "
            f"`python scripts/convert_hf_checkpoint.py --checkpoint_dir {folder}` first"
        )


def check_new(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: already exists and is not an empty folder; choose another or remove it")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends without an error. What a killed process has left of
    one is removed first.

    Raises:
        UserError: `path` exists and holds something; it is never overwritten. Or another process is writing it.
    """
    path = Path(path)
    check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.mkdir(exist_ok=True)
    lock = os.open(temporary, os.O_RDONLY)
    try:
        take_lock(lock, path)
        check_new(path)
        for left in temporary.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    finally:
        os.close(lock)


def take_lock(opened: int, path: Path) -> None:
    """Lock an open file or folder, until it is closed or the process ends in whatever way."""
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path}: another process is writing it; wait for that or end it") from None
    except OSError:
        pass  # a file system that has no locks


def save(path: Path, contents: dict[str, Any]) -> None:
    """torch.save that leaves the old file or the new one, never half of either."""
    with atomic(path) as temporary, short_write(path):
        torch.save(contents, temporary)


@contextmanager
def short_write(path: Path) -> Iterator[None]:
    """Names the file that torch.save could not write, which reports it as a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"{path}: could not be written; is the disk full? ({error})") from None


def save_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """The same for a safetensors file."""
    with atomic(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError:
            raise UserError(f"{path}: could not be written; is the disk full?") from None
        temporary.chmod(0o644)  # safetensors makes it the owner's alone


def save_safetensors_streamed(
    path: Path, layout: Mapping[str, Tensor], contents: Mapping[str, Iterable[bytes | memoryview]]
) -> None:
    """The same for tensors whose bytes come piece by piece.

    Args:
        layout: tensors of the shapes and dtypes to write, on the meta device, those of the widest numbers first.
        contents: the bytes of each.
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
    """The contents of a file written by torch.save; tensors stay mapped from the file. No code in it is run.

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
        if Path(path).is_dir():
            there = " or ".join(map(str, sorted(Path(path).glob("lit_model_*finetuned.pth"))))
            mend = f"did you mean {there}?" if there else "name the file in it"
            raise UserError(f"{path}: is a folder, expected a file of tensors; {mend}") from None
        if "Cannot allocate memory" in str(error):  # to map it to
            raise MemoryError(str(error)) from None
        reason = "it holds code, which is never run" if "Weights only load failed" in str(error) else "is it truncated?"
        raise UserError(f"{path}: not a readable file of tensors ({reason}); make or download it again") from None
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
        with short_write(path), torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(empty, temporary)
        check_room(temporary)
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):  # what is written goes to the file
            state = torch.load(temporary, weights_only=True, mmap=True)
        for name, tensor in tensors:
            state[name].copy_(tensor)


def check_room(sparse: Path) -> None:
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


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """A short hash of a state dict, by which a finetuned file knows its base.

    Reads names, shapes, dtypes and 16 spread-out rows of each tensor: enough to tell any two models apart that were
    trained apart, in milliseconds for a mapped file of any size.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach()
        rows = torch.atleast_2d(tensor).flatten(0, -2)
        spread = rows[torch.linspace(0, len(rows) - 1, min(16, len(rows))).long()].contiguous().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(spread.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def quantization(checkpoint_dir: Path) -> dict[str, Any] | None:
    """What lit_quantize.json says: `quantize`, the format, and `source`, the fingerprint before. None: not quantized.

    Raises:
        UserError: of another format version, or of a format that is not known here.
    """
    path = Path(checkpoint_dir) / "lit_quantize.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version, name = found["format_version"], found["quantize"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not readable as what scripts/quantize.py writes; quantize again") from None
    if version != QUANTIZED_VERSION:
        raise UserError(f"{path}: format version {version!r}, expected {QUANTIZED_VERSION}; quantize again")
    if name not in list(FORMATS):  # a dictionary would refuse what cannot be hashed
        raise UserError(f"{path}: the quantization {name!r} is not known; expected one of {', '.join(FORMATS)}")
    if not isinstance(found.get("source"), str):
        raise UserError(f"{path}: source: expected the fingerprint of the full weights; quantize again")
    return found


def load_state(checkpoint_dir: Path, quantized: bool = False) -> dict[str, Tensor]:
    """The state dict of a converted checkpoint, mapped from lit_model.pth.

    Args:
        quantized: take a quantized one, too.
    """
    check_checkpoint_dir(checkpoint_dir)
    found = quantization(checkpoint_dir)
    if found and not quantized:
        raise UserError(
            f"--checkpoint_dir {checkpoint_dir}: is quantized ({found['quantize']}); expected the folder that it was "
            "made from"
        )
    path = Path(checkpoint_dir) / "lit_model.pth"
    state = load(path)
    if not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{path}: holds more than tensors; expected what `scripts/convert_hf_checkpoint.py` writes")
    return state


def build(
    config: Config,
    state: dict[str, Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    source: Path | str = "the state dict",
    attach: Callable[[GPT], GPT] | None = None,
) -> GPT:
    """A GPT that holds the given tensors, in evaluation mode.

    Args:
        source: names the tensors in errors.
        attach: makes of a GPT on the meta device what the tensors are for.

    Raises:
        UserError: missing or unexpected names, or shapes that the configuration contradicts.
    """
    with on_meta():
        model = GPT(config).to(dtype)
        model = attach(model) if attach else model
    if config.tie_embeddings:
        tied = {name.replace("wte.", "lm_head."): tensor for name, tensor in state.items() if name.startswith("wte.")}
        state = state | tied
    expected = model.state_dict()
    check_state(expected, state, source)
    # a quantized layer has tensors of dtypes that the model's does not bear on
    cast = {name: tensor.to(device, expected[name].dtype if dtype else None) for name, tensor in state.items()}
    model.load_state_dict(cast, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


def check_state(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: Path | str) -> None:
    """Refuse a state dict that is not exactly what a model expects.

    Raises:
        UserError: names up to three offending tensors.
    """
    problems = [f"lacks {name}" for name in expected if name not in found]
    problems += [f"holds unexpected {name}" for name in found if name not in expected]
    problems += [
        f"has {name} as {tuple(found[name].shape)} where {tuple(tensor.shape)} is expected"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{source}: does not fit the model: {'; '.join(problems[:3])}{more}")
