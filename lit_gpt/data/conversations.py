"""Turns a row into the messages of a conversation."""

import json
from typing import Any, NamedTuple

from lit_gpt.data.args import ColumnArgs
from lit_gpt.data.sources import Row
from lit_gpt.errors import UserError
from lit_gpt.text.messages import Message, Tools, instruction_messages, read_messages, read_tools


class BadRow(UserError):
    """Says why a row cannot be used."""


class Conversation(NamedTuple):
    """Holds the messages and tools of a row."""

    where: str  # file and line
    messages: list[Message]
    tools: Tools


def to_conversation(row: Row, columns: ColumnArgs) -> Conversation:
    """Return the messages of a row, from its messages column or from its instruction, input and output columns.

    Raises:
        BadRow: a column is missing or holds something else.
    """
    if row.problem:
        raise BadRow(f"{row.where}: {row.problem}")
    try:
        if row.fields.get(columns.messages_column) is not None:
            messages, tools = read_messages(row.fields[columns.messages_column]), read_tools(row.fields.get("tools"))
        else:
            messages, tools = instruction_messages(*(text_of(row.fields, flag, columns) for flag in COLUMNS)), None
        json.dumps([messages, tools], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # JSON can spell half of an emoji
        raise BadRow(f"{row.where}: holds text that is not Unicode ({error.reason})") from None
    except (TypeError, ValueError) as error:
        raise BadRow(f"{row.where}: {error}") from None
    return Conversation(row.where, messages, tools)


COLUMNS = {"instruction_column": True, "input_column": False, "output_column": True}  # whether a row must have it


def text_of(fields: dict[str, Any], flag: str, columns: ColumnArgs) -> str:
    """Return the text of the column that a flag names; "" where a column that may be absent is."""
    column = getattr(columns, flag)
    value = fields.get(column)
    if value is None and COLUMNS[flag]:
        present = ", ".join(map(str, fields)) or "nothing"
        raise ValueError(f"the field '{column}' is missing (found: {present}); name yours with --*_column flags")
    if not isinstance(value or "", str):
        raise ValueError(f"the field '{column}' is {type(value).__name__}, expected text")
    return value or ""
