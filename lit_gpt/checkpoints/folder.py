"""A checkpoint folder: what belongs in it, its fingerprint, and how it is quantized.

Importing this does not import torch, so that scripts refuse a wrong folder at once.
"""

import hashlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from lit_gpt.checkpoints.outline import check_record, read_outline
from lit_gpt.cli import Quantizer
from lit_gpt.errors import UserError
from lit_gpt.files import refuse_folder

if TYPE_CHECKING:
    from torch import Tensor

QUANTIZED_VERSION = 1
STRETCH = "lit_stretch.json"  # says that the context was stretched: the weights alone would not tell
FORMATS = get_args(Quantizer)


def check_inputs(
    checkpoint_dir: Path,
    finetuned_path: Path | None = None,
    method: str | None = None,
    flag: str = "--finetuned_path",
) -> dict[str, Any]:
    """Refuse a folder that is not a converted checkpoint, and a file that is no finetuned one, without torch.

    Args:
        method: name of the only method to admit; None: any.
        flag: by which the file was given.

    Returns:
        the file's contents without its tensors; without a file, nothing.

    Raises:
        UserError
    """
    check_checkpoint_dir(checkpoint_dir)
    if not finetuned_path:
        return {}
    peft = finetuned_path if finetuned_path.is_dir() else finetuned_path.parent
    if (peft / "adapter_config.json").is_file():
        raise UserError(
            f"{flag} {finetuned_path}: is a PEFT adapter; `python scripts/convert_peft_adapter.py --peft_dir "
            f"{shlex.quote(str(peft))}` makes a finetuned file of it"
        )
    refuse_folder(finetuned_path, "a file of tensors", "lit_model_*finetuned.pth")
    if not finetuned_path.is_file():
        near = sorted(map(str, Path("out").glob("*/*/lit_model_*_finetuned.pth")))
        there = f"there are {', '.join(near)}" if near else "a script of finetune/ writes one"
        raise UserError(f"{flag} {finetuned_path}: no such file; {there}")
    try:
        contents = read_outline(finetuned_path)
        check_record(contents, finetuned_path, method)
    except UserError as error:
        raise UserError(f"{flag} {error}") from None
    return contents


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
            f"`python scripts/convert_hf_checkpoint.py --checkpoint_dir {shlex.quote(str(folder))}` first"
        )


def fingerprint(state: "Mapping[str, Tensor]") -> str:
    """Return a short hash of a state dict, by which a finetuned file knows its base.

    It covers names, shapes, dtypes and 16 spread-out rows of each tensor: enough to tell any two models apart that
    were trained apart, in milliseconds for a mapped file of any size.
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach()
        rows = torch.atleast_2d(tensor).flatten(0, -2)
        spread = rows[torch.linspace(0, len(rows) - 1, min(16, len(rows))).long()].contiguous().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(spread.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def record_stretch(checkpoint_dir: Path, factor: float) -> None:
    """Let a checkpoint folder say that its context is `factor` times as long as before."""
    path = Path(checkpoint_dir) / STRETCH
    before = json.loads(path.read_text(encoding="utf-8"))["context_factor"] if path.exists() else 1.0
    path.write_text(json.dumps({"context_factor": before * factor}, indent=2) + "\n", encoding="utf-8")


def stretched(checkpoint_dir: Path, fingerprint: str) -> str:
    """Return the fingerprint of a folder's weights with its context in it, if that was stretched.

    Raises:
        UserError: the file that says so is not readable.
    """
    path = Path(checkpoint_dir) / STRETCH
    if not path.exists():
        return fingerprint
    try:
        return f"{fingerprint}x{json.loads(path.read_text(encoding='utf-8'))['context_factor']:g}"
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not readable as what scripts/extend.py writes; extend the base again") from None


def quantization(checkpoint_dir: Path) -> dict[str, Any] | None:
    """Read lit_quantize.json: `quantize`, the format, and `source`, the fingerprint of the full weights.

    Returns:
        None for a folder that is not quantized.

    Raises:
        UserError: the file is not readable, of another version, or of a format that is not known here.
    """
    path = Path(checkpoint_dir) / "lit_quantize.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8-sig"))
        version, name = record["format_version"], record["quantize"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not readable as what scripts/quantize.py writes; quantize again") from None
    if version != QUANTIZED_VERSION:
        raise UserError(f"{path}: format version {version!r}, expected {QUANTIZED_VERSION}; quantize again")
    if name not in FORMATS:
        raise UserError(f"{path}: the quantization {name!r} is not known; expected one of {', '.join(FORMATS)}")
    if not isinstance(record.get("source"), str):
        raise UserError(f"{path}: source: expected the fingerprint of the full weights; quantize again")
    return record


def refuse_quantized(checkpoint_dir: Path) -> None:
    """Refuse a folder that scripts/quantize.py wrote. Raises UserError."""
    if record := quantization(checkpoint_dir):
        raise UserError(
            f"--checkpoint_dir {checkpoint_dir}: is quantized ({record['quantize']}); expected the folder that it was "
            "made from"
        )


def load_state(checkpoint_dir: Path) -> "dict[str, Tensor]":
    """Load the state dict of a converted checkpoint that is not quantized, mapped from lit_model.pth.

    Raises:
        UserError: not such a folder.
    """
    check_checkpoint_dir(checkpoint_dir)
    refuse_quantized(checkpoint_dir)
    return read_state(checkpoint_dir)


def read_state(checkpoint_dir: Path) -> "dict[str, Tensor]":
    """Map the tensors of lit_model.pth, quantized or not. Raises UserError if it holds anything else."""
    from torch import Tensor

    from lit_gpt.checkpoints.io import load

    path = Path(checkpoint_dir) / "lit_model.pth"
    state = load(path)
    if not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{path}: holds more than tensors; expected what `scripts/convert_hf_checkpoint.py` writes")
    return state
