"""Reads what a finetuned file says of itself without torch, so that scripts refuse another file at once.

torch.save writes a zip archive: a pickle of the contents, in which each tensor is a reference, and the tensors' bytes
beside it. The pickle alone is read here, with nothing in the tensors' place.
"""

import pickle
from collections import OrderedDict
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from lit_gpt.errors import UserError
from lit_gpt.files import refuse_folder

FORMAT_VERSION = 1
RECORD = {"format_version", "method", "base", "state", "hyperparameters", "prompt_style"}


def read_outline(path: Path) -> dict[str, Any]:
    """Return the contents of a file written by torch.save, without its tensors. No code in it is run.

    Raises:
        UserError: the file is missing, truncated, or holds anything but a dictionary of tensors and plain values.
    """
    try:
        with ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            contents = Unpickler(BytesIO(archive.read(name))).load()
    except OSError as error:
        refuse_folder(path, "a file of tensors", "lit_model_*finetuned.pth")
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (BadZipFile, StopIteration):
        raise UserError(unreadable(path, "is it truncated?")) from None
    except Exception as error:  # a damaged pickle can fail in any way
        reason = str(error) if isinstance(error, pickle.UnpicklingError) else "is it damaged?"
        raise UserError(unreadable(path, reason)) from None
    if not isinstance(contents, dict):
        raise UserError(f"{path}: expected a dictionary of tensors, found {type(contents).__name__}")
    return contents


def unreadable(path: Path, reason: str) -> str:
    """Return the error line for a file that torch.save has not written so."""
    return f"{path}: not a readable file of tensors ({reason}); make or download it again"


class Unpickler(pickle.Unpickler):
    """Reads a pickle of torch.save, in which only torch's own names for tensors stand beside plain values."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in ("torch", "torch._utils"):
            return Nothing
        raise pickle.UnpicklingError("it holds code, which is never run")

    def persistent_load(self, pid: Any) -> None:
        return None


class Nothing:
    """Stands for a tensor, whatever it would be made of."""

    def __init__(self, *made_of: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def check_record(contents: dict[str, Any], path: Path, method: str | None = None) -> None:
    """Refuse what is not the contents of a finetuned file, or of another format version or method than `method`.

    Raises:
        UserError
    """
    if not contents.keys() >= RECORD:
        folder = Path(path).parent
        whole = f"; to use the whole checkpoint that it belongs to, give --checkpoint_dir {folder} and leave this out"
        mend = whole if (folder / "lit_config.json").is_file() else ""
        raise UserError(f"{path}: not a finetuned file; expected what finetune/{method or 'lora'}.py writes{mend}")
    if contents["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {contents['format_version']}, expected {FORMAT_VERSION}; train it again, or use "
            "the release that wrote it"
        )
    if method and contents["method"] != method:
        given = contents["method"]
        raise UserError(
            f"{path}: trained by the method {given}, expected {method}; finetune/{given}.py and generate/finetuned.py "
            "take it"
        )
