"""Streams rows from .json, .jsonl, .csv and .parquet files, data sets of the Hugging Face hub, and folders that
`datasets` has saved, with one row, or a few, in memory at a time.

A .json file is decoded by hand, one value after another: Python's json reads files whole, and ijson would be one more
dependency, which knows no line numbers.
"""

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from lit_gpt.data.csv_table import read_table
from lit_gpt.errors import UserError
from lit_gpt.files import STRICT_JSON, json_problem, not_utf8, undecodable

NO_BLANK = re.compile(r"\S")
BLOCK = 1 << 20  # characters of a .json file read at once
MAX_ROW = 1 << 26  # characters of one row of a .json file
SAVED = ("dataset_info.json", "dataset_dict.json")  # one of them is in a folder that `datasets` has saved
DATA_SET = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")


class Row(NamedTuple):
    """Holds a row's fields, or what is wrong with it."""

    where: str  # file and line, for errors
    fields: dict[str, Any]
    problem: str = ""
    filled: bool = False  # null fields in it may be Arrow's, where other rows have the field


@dataclass(frozen=True)
class Source:
    """Names where rows come from, and yields them.

    Attributes:
        name: a file, a folder that `datasets` has saved, or OWNER/NAME on the hub, which `:SPLIT` or `:CONFIG:SPLIT`
            may follow; else the split is `train`.
        weight: how often each row is taken; for 2.5, twice, and half of the rows once more.
    """

    name: str
    weight: float = 1.0

    def check(self) -> None:
        """Refuse a source that is not there, or of a kind that is not read. Raises UserError."""
        path, folder = Path(self.name), Path(self.name.partition(":")[0])
        if path.suffix.lower() in READERS and not path.is_dir():
            if not path.exists():
                raise UserError(f"{path}: no such file")
        elif path.suffix.lower() in (".txt", ".md"):
            raise UserError(
                f"{path}: a text has no rows; write a .jsonl file, with an object on each line: "
                '{"instruction": ..., "output": ...} to learn answers, {"text": ...} to learn texts whole'
            )
        elif folder.is_dir():
            check_saved(folder)
        elif folder.exists() or not DATA_SET.fullmatch(self.name):
            raise UserError(
                f"{path}: expected a file that ends in {', '.join(READERS)}, a folder that datasets has saved, or the "
                "OWNER/NAME of a data set"
            )

    def rows(self) -> Iterator[Row]:
        """Yield the rows in their order, those that cannot be read among them.

        Raises:
            UserError: the source is missing, or malformed so that nothing after it can be read.
        """
        self.check()
        path = Path(self.name)
        read = READERS.get(path.suffix.lower())
        try:
            if read and not path.is_dir():
                yield from read(path)
            else:
                yield from dataset_rows(self.name)
        except UnicodeDecodeError:
            raise UserError(not_utf8(path)) from None


def parse_sources(text: str) -> list[Source]:
    """Return the sources that a flag names: `a.jsonl`, or several with weights, `a.jsonl,b.parquet=0.5,owner/name=2`.

    Raises:
        UserError: a weight is not a number above 0 and up to 100, or there is no source.
    """
    sources = []
    for part in split_names(text):
        name, equals, weight = part.rpartition("=")
        if not equals or Path(part).exists():
            sources.append(Source(part))
            continue
        try:
            sources.append(Source(name, float(weight)))
        except ValueError:
            sources.append(Source(name, 0.0))
        if not 0 < sources[-1].weight <= 100:
            raise UserError(f"{part}: expected FILE=WEIGHT, the weight a number above 0 and up to 100")
    if not sources:
        raise UserError(f"'{text}': names no rows; expected a file, or several with commas between")
    return sources


def split_names(text: str) -> Iterator[str]:
    """Yield the parts of a text that lie between commas; a file may have commas in its name. `~` is expanded."""
    parts = text.split(",")
    while parts:
        for end in range(len(parts), 0, -1):  # the longest that there is
            part = os.path.expanduser(",".join(parts[:end]).strip())
            name, equals, weight = part.rpartition("=")
            if end == 1 or Path(part).exists() or (equals and "," not in weight and Path(name).exists()):
                break
        parts = parts[end:]
        if part:
            yield part


def check_saved(folder: Path) -> None:
    """Refuse a folder that `datasets` has not saved, naming what is in it. Raises UserError."""
    if any((folder / mark).is_file() for mark in SAVED):
        return
    there = sorted(path.name for path in folder.iterdir())
    files = [str(folder / name) for name in there if Path(name).suffix.lower() in READERS]
    mend = f"did you mean {', '.join(files[:5])}?" if files else f"it holds {', '.join(there[:5]) or 'nothing'}"
    raise UserError(
        f"{folder}: is a folder, but not one that datasets has saved; expected a file that ends in "
        f"{', '.join(READERS)}; {mend}"
    )


def json_row(where: str, value: Any) -> Row:
    """Return the row of a JSON value."""
    if isinstance(value, dict):
        return Row(where, value)
    return Row(where, {}, f"expected an object, found {type(value).__name__}")


def jsonl_rows(path: Path) -> Iterator[Row]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}: line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield json_row(where, STRICT_JSON.decode(text))
            except UnicodeDecodeError:
                yield Row(where, {}, f"not UTF-8 text ({undecodable(line)}); save the file as UTF-8")
            except (ValueError, RecursionError) as error:
                spread = number == 1 and text.strip() in ("[", "{")
                hint = "; each line holds an object here, a list over many lines goes into a .json file"
                yield Row(where, {}, json_problem(error) + (hint if spread else ""))


def json_rows(path: Path) -> Iterator[Row]:
    """Yield the objects of a list, decoded one by one."""
    with open(path, encoding="utf-8-sig") as file:
        window = Window(path, file)
        if not (first := window.peek()):
            return
        if first == "{":
            raise UserError(f"{path}: expected a list of objects (one object a line belongs into a .jsonl file)")
        window.take("[")
        for count in itertools.count(1):
            if window.peek() == "]" and count == 1:
                break
            yield json_row(f"{path}: row {count}", window.value())
            if window.peek() == "]":
                break
            window.take(",")
        window.take("]")
        if window.peek():
            raise window.failure("not JSON: something follows the list", window.at)


class Window:
    """Holds a piece of a JSON file, and moves on over the file as values are taken from it."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path, self.file = path, file
        self.text, self.at, self.line, self.ended = "", 0, 1, False

    def more(self) -> None:
        """Drop what was taken and read a block."""
        block = self.file.read(BLOCK)
        self.line += self.text.count("\n", 0, self.at)
        self.text, self.at, self.ended = self.text[self.at :] + block, 0, not block

    def peek(self) -> str:
        """Return the next character that is no blank, or "" at the end of the file."""
        while not (character := NO_BLANK.search(self.text, self.at)):
            self.at = len(self.text)
            if self.ended:
                return ""
            self.more()
        self.at = character.start()
        return character[0]

    def take(self, character: str) -> None:
        """Move on over a character that must come next."""
        if self.peek() != character:
            raise self.failure(f"not JSON: Expecting '{character}'", self.at)
        self.at += 1

    def value(self) -> Any:
        """Return the value that comes next, and move on over it."""
        self.peek()
        while True:
            try:
                value, self.at = STRICT_JSON.raw_decode(self.text, self.at)
                return value
            except JSONDecodeError as error:  # perhaps only for now
                if self.ended or len(self.text) - self.at > MAX_ROW:
                    raise self.failure(json_problem(error), error.pos) from None
                self.more()
            except (ValueError, RecursionError) as error:
                raise self.failure(json_problem(error), self.at) from None

    def failure(self, message: str, place: int) -> UserError:
        """Return an error that names the line of a place in the text."""
        line = self.line + self.text.count("\n", 0, place)
        return UserError(f"{self.path}: line {line}: {message}")


def csv_rows(path: Path) -> Iterator[Row]:
    for line, cells, problem in read_table(path):
        yield Row(f"{path}: line {line}", cells, problem)


def parquet_rows(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: needs pyarrow: pip install -e '.[parquet]'") from None
    count = 0
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise UserError(f"{path}: two columns are named '{twice}'; rename or remove one")
            for batch in file.iter_batches(batch_size=256):
                for fields in batch.to_pylist():
                    count += 1
                    yield Row(f"{path}: row {count}", fields, filled=True)
    except ArrowException as error:
        raise UserError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


def dataset_rows(name: str) -> Iterator[Row]:
    """Yield the rows of a data set on the hub, kept in the cache of `datasets`, or of a folder that it saved."""
    folder, _, split = name.partition(":")
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name}: needs the package datasets: pip install -e '.[datasets]'") from None
    try:
        if Path(folder).is_dir():
            rows = datasets.load_from_disk(folder)
            rows = rows[split or "train"] if isinstance(rows, datasets.DatasetDict) else rows
        else:
            config, _, last = split.rpartition(":")
            rows = datasets.load_dataset(folder, config or None, split=last or "train")
    except Exception as error:  # whatever the network, the data set or its loader does
        raise UserError(f"{name}: could not be loaded by datasets ({' '.join(str(error).split())[:300]})") from None
    for i, fields in enumerate(rows, 1):
        yield Row(f"{name}: row {i}", fields, filled=True)


READERS = {
    ".json": json_rows, ".jsonl": jsonl_rows, ".csv": csv_rows, ".tsv": csv_rows, ".parquet": parquet_rows
}  # fmt: skip


def source_file(repo_id: str, name: str) -> str:
    """Return the path of a file of a data set on the hub, downloaded once into the hub's cache.

    Raises:
        UserError: it cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repo_id, name, repo_type="dataset")
    except Exception as error:  # whatever the network does
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{repo_id}: {name} could not be downloaded ({reason}); give a local copy by --data_path"
        ) from None
