"""Turns a row into the messages of a conversation."""

import json
from dataclasses import dataclass, field
from typing import Any

from lit_gpt.data.args import ColumnArgs
from lit_gpt.data.sources import Row
from lit_gpt.errors import UserError
from lit_gpt.text.messages import (
    Message,
    Tools,
    instruction_messages,
    is_empty,
    read_history,
    read_messages,
    read_tools,
    text_of,
    with_system,
)

SHAREGPT = "conversations"  # its name of the column of messages
NAME_YOURS = "; name yours with --*_column flags"


class BadRow(UserError):
    """Says why a row cannot be used."""


@dataclass
class Conversation:
    """Holds the messages and tools of a row.

    Attributes:
        where: file and line.
        plain: it is a text, which is learned whole and without a prompt style; its only message holds it.
        unused: names of the row's fields from which nothing was taken.
        empty_answers: answers without content, which are not learned.
        nulls: fields of calls and schemas that were left out, for Arrow makes such where other rows have the field.
    """

    where: str
    messages: list[Message]
    tools: Tools = None
    plain: bool = False
    unused: list[str] = field(default_factory=list)
    empty_answers: int = 0
    nulls: int = 0


def to_conversation(row: Row, columns: ColumnArgs, hint: str = NAME_YOURS) -> Conversation:
    """Return the messages of a row: from its column of messages; its instruction, input and output; its prompt and
    completion; or its text.

    Args:
        hint: what the error says where a column is missing.

    Raises:
        BadRow: a column is missing or holds something else.
    """
    if row.problem:
        raise BadRow(f"{row.where}: {row.problem}")
    try:
        conversation = read_row(row, columns, hint)
        json.dumps([conversation.messages, conversation.tools], ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:  # JSON can spell half of an emoji
        raise BadRow(f"{row.where}: holds text that is not Unicode ({error.reason})") from None
    except RecursionError:
        raise BadRow(f"{row.where}: its messages or tools are nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise BadRow(f"{row.where}: {error}") from None
    return conversation


def read_row(row: Row, columns: ColumnArgs, hint: str) -> Conversation:
    """Read a row in the form that it has. Raises ValueError if it has none."""
    fields = {name: value for name, value in row.fields.items() if value is not None}
    listed = next((name for name in (columns.messages_column, SHAREGPT) if name in fields), None)
    instruction = any(name in fields for name in (columns.instruction_column, columns.output_column))
    taken = {"system", "tools"}
    history: list[Message] = []
    if listed is None:
        refuse_preference(fields)
    if listed:
        messages = read_messages(fields[listed], listed)
        taken |= {listed}
    elif "prompt" in fields and "completion" in fields and not instruction:
        messages = prompt_messages(fields)
        taken |= {"prompt", "completion"}
    elif isinstance(fields.get("text"), str) and not instruction and "prompt" not in fields:
        unused = [name for name, value in fields.items() if name != "text" and value != ""]
        return Conversation(row.where, [{"role": "assistant", "content": fields["text"]}], plain=True, unused=unused)
    else:
        names = (columns.instruction_column, columns.input_column, columns.output_column)
        texts = (text_of(row.fields, name, need) for name, need in zip(names, (hint, None, hint), strict=True))
        messages, history = instruction_messages(*texts), read_history(fields.get("history"))
        taken |= {*names, "history"}
    messages, tools = with_system(text_of(fields, "system"), history + messages), read_tools(fields.get("tools"))
    unused = [name for name, value in fields.items() if name not in taken and value != ""]
    conversation = Conversation(row.where, messages, tools, unused=unused)
    if row.filled:
        leave_out_nulls(conversation)
    for message in filter(is_empty, messages):
        message["train"], conversation.empty_answers = False, conversation.empty_answers + 1
    return conversation


def refuse_preference(fields: dict[str, Any]) -> None:
    """Refuse a row of preference data, of which finetuning on answers would learn the worse ones as well or blindly.

    Raises:
        ValueError: it has `chosen` and `rejected`, or a completion that is labeled as wanted or not.
    """
    if "chosen" in fields and "rejected" in fields:
        raise ValueError(
            "holds a preference ('chosen' and 'rejected'), and finetuning learns from answers; to learn the chosen "
            "ones, make rows without 'rejected'"
        )
    if "completion" in fields and isinstance(fields.get("label"), bool):
        raise ValueError(
            "holds a judged answer ('completion' and 'label' true or false), and finetuning learns every answer; make "
            "rows of the wanted ones, without 'label'"
        )


def prompt_messages(fields: dict[str, Any]) -> list[Message]:
    """Return the messages of `prompt` and `completion`, each of which is text or a list of messages.

    Only the completion is learned.
    """
    if isinstance(fields["prompt"], str):
        messages = instruction_messages(fields["prompt"])
    else:
        messages = [message | {"train": False} for message in read_messages(fields["prompt"], "prompt")]
    if isinstance(fields["completion"], str):
        return [*messages, {"role": "assistant", "content": fields["completion"]}]
    return messages + read_messages(fields["completion"], "completion")


def leave_out_nulls(conversation: Conversation) -> None:
    """Remove and count the null fields of calls and schemas."""
    for message in conversation.messages:
        for name, value in message.items():
            message[name] = without_nulls(value, conversation)
    if conversation.tools:
        conversation.tools = without_nulls(conversation.tools, conversation)


def without_nulls(value: Any, conversation: Conversation) -> Any:
    if isinstance(value, dict):
        conversation.nulls += sum(part is None for part in value.values())
        return {name: without_nulls(part, conversation) for name, part in value.items() if part is not None}
    return [without_nulls(part, conversation) for part in value] if isinstance(value, list) else value
