"""Reads what can be known of a folder of prepared data without torch: its record, and how long its samples are."""

from pathlib import Path
from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.files import read_json

FORMAT_VERSION = 1
SPLITS = ("train", "validation")


def read_record(data_dir: Path, flag: str = "--data_dir") -> dict[str, Any]:
    """Return the contents of data.json.

    Args:
        flag: the one by which the folder was given.

    Raises:
        UserError: not a data folder, or one of another format version.
    """
    path = Path(data_dir) / "data.json"
    try:
        record = read_json(path)
    except UserError:
        raise UserError(
            f"{flag} {data_dir}: not a folder of prepared data; make one with scripts/prepare_alpaca.py or "
            "scripts/prepare_json.py"
        ) from None
    if record.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {record.get('format_version')}, expected {FORMAT_VERSION}; prepare again"
        )
    return record


def sample_lengths(data_dir: Path, split: str) -> list[int]:
    """Return how many tokens each sample of a split has.

    Raises:
        UserError: the split is missing or damaged.
    """
    import numpy
    from safetensors import SafetensorError, safe_open

    path = Path(data_dir) / f"{split}.safetensors"
    try:
        with safe_open(path, framework="numpy") as file:
            return numpy.diff(file.get_tensor("offsets")).tolist()
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not readable as prepared data ({error}); prepare it again") from None
