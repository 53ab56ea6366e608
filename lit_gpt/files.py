"""Writes files whole or not at all, and reads text and JSON.

Nothing here imports torch: scripts/report.py answers at once.
"""

import fcntl
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_gpt.errors import UserError, reason

STRAY_COMMA = re.compile(r'("(?:[^"\\]|\\.)*")|,(\s*[}\]])')  # strings, which keep theirs, or a comma


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces the file `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # torch.save names what it writes after the file, up to the last dot: behind that stands what differs between runs
    temporary = path.with_name(f".{path.name}.tmp.{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_new(path: Path) -> None:
    """Refuse a path that exists, unless it is an empty folder, or what a killed process has left of one."""
    half_made = {unfinished(path).name}
    if path.exists() and (not path.is_dir() or {entry.name for entry in path.iterdir()} - half_made):
        raise UserError(f"{path}: already exists and is not an empty folder; choose another or remove it")
    if not path.exists():
        check_writable(path)


def check_writable(given: Path, flag: str = "--out_dir") -> None:
    """Refuse a folder that cannot be written to, or cannot be made: a run would only find out at its end.

    Nothing is left of the trial, which is made in the folder, or in the one in which it would be made.

    Raises:
        UserError
    """
    for path in (given, *given.parents):
        if path.is_symlink() and not path.exists():
            raise UserError(
                f"{flag} {path}: is a link to {path.readlink()}, which does not exist; make that or choose another"
            )
    folder = given.resolve()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        os.rmdir(tempfile.mkdtemp(dir=there))
    except OSError as error:
        reason = "" if isinstance(error, FileNotFoundError) else f" ({error.strerror})"  # as /proc says it
        raise UserError(
            f"{flag} {given}: nothing can be written in {there}{reason}; choose a folder that is yours"
        ) from None


def check_out_file(path: Path, flag: str = "--out") -> None:
    """Refuse a file that cannot be written: a run would only find out at its end. Raises UserError."""
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder; expected a file, such as {path / 'out.jsonl'}")
    check_writable(path.parent, flag)


def unfinished(path: Path) -> Path:
    """Return where a new folder is made: beside it, or within one that cannot be replaced.

    A mount point cannot be, nor can the folder that we are in (the shell would stay in the old one) or one whose parent
    may not be written to.
    """
    path = path.resolve()
    parent = path.parent
    stays = path.is_dir() and (os.path.ismount(path) or path == Path.cwd() or not os.access(parent, os.W_OK))
    return (path if stays else parent) / f".{path.name}.tmp"


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an error.

    What a killed process has left of one is removed first.

    Raises:
        UserError: `path` exists and holds something, which is never overwritten, or another process is writing it.
    """
    check_new(Path(path))
    path, temporary = Path(path).resolve(), unfinished(Path(path))
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.mkdir(exist_ok=True)
    lock = os.open(temporary, os.O_RDONLY)
    try:
        take_lock(lock, path)
        check_new(path)
        for left in temporary.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield temporary
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        put_in_place(temporary, path)
    finally:
        os.close(lock)


def put_in_place(temporary: Path, path: Path) -> None:
    """Have a finished folder become `path`, which is an empty folder or nothing.

    Raises:
        UserError: it cannot; what was made stays where it is.
    """
    try:
        if temporary.parent != path:
            try:
                return os.replace(temporary, path)
            except OSError:  # something is mounted there
                path.mkdir(exist_ok=True)
        for entry in sorted(temporary.iterdir()):
            shutil.move(entry, path / entry.name)
        temporary.rmdir()
    except OSError as error:
        raise UserError(
            f"{path}: could not be put in place ({error.strerror}); it is complete in {temporary}"
        ) from None


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


def read_text(path: Path) -> str:
    """Return the text in a file, without the byte order mark that some editors put first.

    Raises:
        UserError: it is not UTF-8; the line is named.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(not_utf8(path)) from None


def not_utf8(path: Path) -> str:
    """Return what is wrong with a file that is not UTF-8 text: the first line that is not, and what to do."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if reason := undecodable(line):
                return f"{path}: expected UTF-8 text (line {number}: {reason}); save the file as UTF-8"
    return f"{path}: expected UTF-8 text; save the file as UTF-8"


def undecodable(line: bytes) -> str:
    """Return why a line is not UTF-8 text; "" if it is."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        utf_16 = line.startswith((b"\xff\xfe", b"\xfe\xff"))
        return "this is UTF-16" if utf_16 else f"{error.reason} at byte {error.start} of the line"
    return ""


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make the object of a JSON text, of which Python would take the last of several fields of one name.

    Raises:
        ValueError: names it.
    """
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field '{twice}' stands twice in one object")
    return fields


STRICT_JSON = json.JSONDecoder(object_pairs_hook=distinct)


def json_problem(error: ValueError | RecursionError) -> str:
    """Return in words why a text could not be decoded by STRICT_JSON."""
    if isinstance(error, RecursionError):
        return "not JSON that can be read: nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg}"
    if "integer string conversion" in str(error):
        return "not JSON that can be read: it has a whole number of thousands of digits; write it as text"
    return str(error)


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
        contents = parse(path.read_text(encoding="utf-8-sig"), path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON, but this is not a readable JSON file ({reason(error)})") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path}: expected a JSON object, but it holds a {type(contents).__name__}")
    return contents


def parse(text: str, path: Path) -> Any:
    """Return what a JSON text holds, with commas before a closing bracket passed over, which is said.

    Raises:
        ValueError: it is not JSON for another reason.
    """
    try:
        return json.loads(text)
    except ValueError:
        without = STRAY_COMMA.sub(lambda found: found[1] or found[2], text)
        contents = json.loads(without)
    print(f"{path}: has a comma before a closing bracket, which JSON has not; it is passed over", file=sys.stderr)
    return contents


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """Write an object to a JSON file, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
