"""Messages and tools of a conversation, in the spellings in which people have them."""

import json
from typing import Any

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None  # the tools of a conversation as JSON schemas


def instruction_messages(instruction: str, context: str = "", output: str | None = None) -> list[Message]:
    """Return the messages of a row of instruction data; without `output`, those of a prompt."""
    content = f"{instruction}\n\n{context}" if context else instruction
    user = {"role": "user", "content": content, "instruction": instruction, "input": context}
    return [user] if output is None else [user, {"role": "assistant", "content": output}]


ROLES = {"human": "user", "gpt": "assistant", "function": "tool"}  # as ShareGPT has them


def read_messages(messages: Any) -> list[Message]:
    """Read messages as `{"role", "content"}`, from a list of them or from one spelled in JSON.

    Raises:
        ValueError: it is no list of messages.
    """
    messages = json.loads(messages) if isinstance(messages, str) else messages
    if not isinstance(messages, list) or not messages:
        raise ValueError("expected a list of messages")
    return [read_message(message) for message in messages]


def read_message(message: Any) -> Message:
    message = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
    if "role" not in message and isinstance(message.get("from"), str):
        role = message.pop("from")
        message = {"role": ROLES.get(role, role), "content": message.pop("value", None), **message}
    calls = message.get("tool_calls", [])
    named = isinstance(calls, list) and all(
        isinstance(call, dict) and isinstance(call.get("function", call), dict)
        and isinstance(call.get("function", call).get("name"), str)
        for call in calls
    )  # fmt: skip
    if not named:
        raise ValueError('expected tool_calls as a list of {"function": {"name": text, "arguments": object}}')
    content = message.get("content", "" if calls else None)
    if not isinstance(message.get("role"), str) or not isinstance(content, str):
        raise ValueError('expected each message as {"role": text, "content": text}')
    if not isinstance(message.get("train", True), bool) or message.get("weight", 1) not in (0, 1):
        raise ValueError("expected a message's train as true or false, its weight as 0 or 1")
    return message


def read_tools(tools: Any) -> Tools:
    tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("expected tools as a list of JSON schemas")
    return tools
