"""Writes files whole or not at all, and reads JSON objects.

Nothing here imports torch: scripts/report.py answers at once.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_gpt.errors import UserError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces the file `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_new(path: Path) -> None:
    """Refuse a path that exists, unless it is an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: already exists and is not an empty folder; choose another or remove it")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an error.

    What a killed process has left of one is removed first.

    Raises:
        UserError: `path` exists and holds something, which is never overwritten, or another process is writing it.
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


def refuse_folder(path: Path, expected: str, pattern: str) -> None:
    """Refuse a folder where a file is expected, naming the files in it that may be meant.

    Args:
        expected: what should have been given, in words.
        pattern: a glob of such files' names.
    """
    if Path(path).is_dir():
        there = " or ".join(map(str, sorted(Path(path).glob(pattern))))
        mend = f"did you mean {there}?" if there else "name the file in it"
        raise UserError(f"{path}: is a folder, expected {expected}; {mend}")


def take_lock(opened: int, path: Path) -> None:
    """Lock an open file or folder, until it is closed or the process ends in whatever way."""
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path}: another process is writing it; wait for that or end it") from None
    except OSError:
        pass  # a file system that has no locks


def read_json(path: Path, missing_ok: bool = False) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        missing_ok: return an empty one where there is no file.

    Raises:
        UserError: the file is missing, cannot be read, or holds something else.
    """
    if missing_ok and not path.is_file():
        return {}
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected JSON, but this is not a readable JSON file ({error})") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path}: expected a JSON object, but it holds a {type(contents).__name__}")
    return contents


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """Write an object to a JSON file, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
