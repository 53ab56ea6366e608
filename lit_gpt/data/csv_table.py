"""Reads a table of comma-separated values strictly: nothing is merged, overwritten or guessed without a word."""

import csv
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from lit_gpt.errors import UserError

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
SEP_LINE = re.compile(r"sep=(.)\r?\n")  # the first line of a file for Excel may name the delimiter
Cells = dict[str, str]


def read_table(path: Path) -> Iterator[tuple[int, Cells, str]]:
    """Yield the rows: the line where each begins, its cells by column, and what is wrong with it.

    Raises:
        UserError: a quote is not closed, or two columns have the same name.
        UnicodeDecodeError: the file is not UTF-8.
    """
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8-sig", newline="") as file:
        records = Records(path, file)
        header = next(records, None)
        if header is None:
            return
        names = header[1]
        check_names(path, names)
        for line, cells in records:
            if len(cells) != len(names):
                between = f"between {DELIMITERS[records.delimiter]}"
                yield line, {}, f"expected {len(names)} columns as in the first line, {between}; found {len(cells)}"
                continue
            if names.count("") > 1 and any(cell and not name for name, cell in zip(names, cells, strict=True)):
                yield line, {}, "has a value in one of several columns without a name"
                continue
            yield line, dict(zip(names, cells, strict=True)), ""


def check_names(path: Path, names: list[str]) -> None:
    """Refuse a first line that names a column twice."""
    twice = [name for name, count in Counter(names).items() if count > 1 and name]
    if twice:
        raise UserError(f"{path}: line 1: two columns are named '{twice[0]}'; rename or remove one")


class Records(Iterator[tuple[int, list[str]]]):
    """Yields the records of a file, each with the line where it begins; says which delimiter it found if no comma."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path, self.file = path, file
        self.lines: list[str] = []  # of the record in work
        self.number = 0  # of the last line that was read
        first = file.readline()
        self.waiting = [first] if first else []
        if named := SEP_LINE.fullmatch(first):
            self.waiting, self.number = [file.readline()], 1
        self.delimiter = named[1] if named and named[1] in DELIMITERS else self.find_delimiter()
        if self.delimiter != ",":
            print(f"{path}: columns lie between {DELIMITERS[self.delimiter]}", file=sys.stderr)
        self.reader = csv.reader(self.read_lines(), delimiter=self.delimiter, strict=True)

    def find_delimiter(self) -> str:
        """Return what lies between the columns of the first line: commas, if there are any."""
        for delimiter in DELIMITERS:
            try:
                if self.waiting and len(next(csv.reader(self.waiting, delimiter=delimiter))) > 1:
                    return delimiter
            except (csv.Error, StopIteration):
                continue
        return ","

    def read_lines(self) -> Iterator[str]:
        while line := self.waiting.pop() if self.waiting else self.file.readline():
            self.number += 1
            self.lines.append(line)
            yield line

    def __next__(self) -> tuple[int, list[str]]:
        while True:
            self.lines.clear()
            begin = self.number + 1
            try:
                cells = next(self.reader)
            except csv.Error as error:
                raise UserError(f"{self.path}: {self.explain(begin, str(error))}") from None
            if cells:
                return begin, cells

    def explain(self, begin: int, error: str) -> str:
        """Return the line of an error, and in words what is wrong there."""
        text = "".join(self.lines)
        opened = unclosed_quote(text, self.delimiter)
        if opened is None:
            return f"line {begin}: not CSV: {error}"
        line = begin + len(re.findall(r"\r\n|\r|\n", text[:opened]))
        wrong = "a quote opens here, and what closes it is followed by neither a delimiter nor the line's end"
        return f"line {line}: not CSV: {wrong}; write a quote within a field twice"


def unclosed_quote(text: str, delimiter: str) -> int | None:
    """Return where in a record a field's quote opens that does not end before a delimiter or at the end of a line."""
    at, end = 0, re.escape(delimiter) + r"\r\n"
    field = re.compile(rf'"(?:[^"]|"")*+"(?=[{end}]|\Z)|[^"{end}][^{end}]*|')
    while at < len(text):
        found = field.match(text, at)
        if not found or (not found[0] and text[at] == '"'):
            return at
        at = found.end() + 1
    return None
