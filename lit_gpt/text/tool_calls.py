"""Calls of tools in an answer's text, in the forms that chat templates teach.

Hermes, Qwen    <tool_call>{"name": ..., "arguments": {...}}</tool_call>, several after another, behind other text
Llama 3         {"name": ..., "parameters": {...}}, several with a semicolon between them
Mistral         [TOOL_CALLS] [{"name": ..., "arguments": {...}}], or in newer models [TOOL_CALLS]name[ARGS]{...}

The markers in brackets, and Llama's <|python_tag|>, are special tokens, which a decoded text does not show.
"""

import json
import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

BLOCK = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)
MARKER = re.compile(r"^\s*(?:\[TOOL_CALLS\]|<\|python_tag\|>)")
NAMED = re.compile(r"^(?:\[TOOL_CALLS\])?\s*([\w.-]+)\s*(?:\[ARGS\])?\s*(?={)")
BETWEEN = re.compile(r"[\s;]*")
DECODER = json.JSONDecoder(strict=False)  # models write newlines as they are


class Call(NamedTuple):
    """A tool's name, and its arguments as JSON."""

    name: str
    arguments: str


def parse_calls(text: str, tools: Collection[str]) -> tuple[str, list[Call]]:
    """Return the text of an answer without its calls, and the calls.

    A text that calls none of these tools, or none as it should, comes back whole.

    Args:
        tools: names of those that may be called.
    """
    blocks = list(BLOCK.finditer(text))
    spelled = [block.group(1) for block in blocks] if blocks else [MARKER.sub("", text)]
    try:
        values = [value for one in spelled for value in values_in(one)]
        calls = [call_of(value, tools) for value in values]
    except (ValueError, RecursionError):
        calls = []
    if calls:
        return text[: blocks[0].start()].rstrip() if blocks else "", calls
    named = named_calls(text, tools)
    return ("", named) if named else (text, [])


def values_in(text: str) -> Iterator[Any]:
    """Yield the values that a text spells in JSON, those of a list one by one. Raises ValueError if it spells none."""
    at = BETWEEN.match(text).end()  # type: ignore[union-attr]  # it matches any text
    while at < len(text):
        value, at = DECODER.raw_decode(text, at)
        yield from value if isinstance(value, list) else [value]
        at = BETWEEN.match(text, at).end()  # type: ignore[union-attr]


def call_of(value: Any, tools: Collection[str]) -> Call:
    """Return the call that a value is. Raises ValueError if it is none of these tools."""
    value = value.get("function", value) if isinstance(value, dict) else {}
    if not isinstance(value, dict) or value.get("name") not in tools:
        raise ValueError("no call")
    arguments = value.get("arguments", value.get("parameters", {}))
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        raise ValueError("no arguments")
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False))


def named_calls(text: str, tools: Collection[str]) -> list[Call]:
    """Return the calls of a text that is nothing but names with arguments behind them."""
    calls = []
    while found := NAMED.match(text):
        try:
            arguments, end = DECODER.raw_decode(text, found.end())
        except (ValueError, RecursionError):
            return []
        if found.group(1) not in tools:
            return []
        calls.append(Call(found.group(1), json.dumps(arguments, ensure_ascii=False)))
        text = text[end:].lstrip()
    return [] if text else calls
