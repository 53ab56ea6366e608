"""Messages and tools of a conversation, in the spellings in which people have them."""

import json
import re
from collections.abc import Iterator
from typing import Any

from lit_gpt.files import STRICT_JSON, json_problem

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None  # the tools of a conversation as JSON schemas
# Who speaks, by the names of OpenAI, ShareGPT, Gemma and others; read without regard to capitals.
ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "chatgpt", "model", "bot"),
    "tool": ("tool", "function", "observation", "tool_response", "ipython"),
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
CALLS = ("function_call", "tool_call")  # roles of a message whose content is a call, spelled in JSON
REASONING = ("reasoning_content", "thinking", "reasoning")  # the names under which a message's reasoning goes
TEXT_PARTS = ("text", "input_text", "output_text")  # OpenAI's types of a content part that is text
CALL_FORM = 'expected tool_calls as a list of {"function": {"name": text, "arguments": object}}'


def instruction_messages(instruction: str, context: str = "", output: str | None = None) -> list[Message]:
    """Return the messages of a row of instruction data; without `output`, those of a prompt."""
    content = f"{instruction}\n\n{context}" if context else instruction
    user = {"role": "user", "content": content, "instruction": instruction, "input": context}
    return [user] if output is None else [user, {"role": "assistant", "content": output}]


def text_of(fields: dict[str, Any], name: str, hint: str | None = None) -> str:
    """Return the text of a field.

    Args:
        hint: what to do where the field is missing. None: it may be, and is "" then.

    Raises:
        ValueError: the field is missing, null or holds something else.
    """
    value = fields.get(name)
    if value is None and hint is None:
        return ""
    if value is None:
        state = "null" if name in fields else "missing"
        raise ValueError(f"the field '{name}' is {state} (found: {', '.join(map(str, fields)) or 'nothing'}){hint}")
    if not isinstance(value, str):
        raise ValueError(f"the field '{name}' is {type(value).__name__}, expected text")
    return value


def from_json(name: str, value: Any) -> Any:
    """Decode a field that may be spelled in JSON.

    Raises:
        ValueError: it is text, and not JSON; the field is named.
    """
    if not isinstance(value, str):
        return value
    try:
        return STRICT_JSON.decode(value)
    except (ValueError, RecursionError) as error:
        python = "; this is Python's own spelling, json.dumps writes JSON" if PYTHON.match(value) else ""
        raise ValueError(f"the field '{name}' is text, {json_problem(error)}{python}") from None


PYTHON = re.compile(r"[\s\[{(]+'")  # how lists and objects begin that str() has spelled


def read_messages(messages: Any, name: str = "messages") -> list[Message]:
    """Read messages as `{"role", "content"}`, from a list of them or from one spelled in JSON.

    Args:
        name: of the field that holds them.

    Raises:
        ValueError: it is no list of messages; the field or the message is named.
    """
    messages = from_json(name, messages)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"the field '{name}': expected a list of messages")
    read = []
    for number, message in enumerate(messages, 1):
        try:
            read.append(read_message(message))
        except ValueError as error:
            raise ValueError(f"the field '{name}', message {number}: {error}") from None
    return read


def read_message(message: Any) -> Message:
    """Read a message as `{"role", "content"}`, with calls as `tool_calls`.

    Raises:
        ValueError: it is no message, or nobody known speaks.
    """
    form = 'expected each message as {"role": text, "content": text}'
    if not isinstance(message, dict):
        raise ValueError(f"{form}, found {type(message).__name__}")
    message = {k: v for k, v in message.items() if v is not None}
    speaker, content = take(message, "role", "from"), take(message, "content", "value")
    if not isinstance(speaker, str):
        raise ValueError(form + ("" if speaker is None else f", found role as {type(speaker).__name__}"))
    role = ROLE_OF.get(speaker.strip().lower())
    if speaker.strip().lower() in CALLS:
        role, content, message = "assistant", "", {"tool_calls": wrapped(from_json("value", content)), **message}
    elif role is None:
        raise ValueError(f"the role '{speaker}' is not known; expected one of {', '.join((*ROLE_OF, *CALLS))}")
    calls, content = read_calls(message), read_content(content)
    if not isinstance(content, str) and not (content is None and calls):
        found = "none" if content is None else type(content).__name__
        raise ValueError(f"{form}, found content as {found}")
    if not isinstance(message.get("train", True), bool) or message.get("weight", 1) not in (0, 1):
        raise ValueError("expected a message's train as true or false, its weight as 0 or 1")
    says = {} if content is None else {"content": content}
    return {"role": role, **says, **message, **({"tool_calls": calls} if calls else {})}


def take(message: Message, name: str, other: str) -> Any:
    """Remove a field that has two names, and return its value. Raises ValueError if both hold different ones."""
    values = [message.pop(key) for key in (name, other) if key in message]
    if len(values) == 2 and values[0] != values[1]:
        raise ValueError(f"'{name}' and '{other}' differ")
    return values[0] if values else None


def read_calls(message: Message) -> list[dict[str, Any]]:
    """Remove the calls of a message, and return them in one form.

    Raises:
        ValueError: they have another.
    """
    calls = from_json("tool_calls", message.pop("tool_calls", []))
    if isinstance(message.get("function_call"), dict) and not calls:  # OpenAI's name before tool_calls
        calls = wrapped(message.pop("function_call"))
    if not isinstance(calls, list):
        raise ValueError(CALL_FORM)
    for call in calls:
        check_call(call)
    return calls


def wrapped(calls: Any) -> Any:
    """Return one or several calls {"name", "arguments"} as tool_calls have them."""
    calls = [calls] if isinstance(calls, dict) else calls
    return [{"type": "function", "function": call} for call in calls] if isinstance(calls, list) else calls


def check_call(call: Any) -> None:
    """Refuse what is no call. Raises ValueError."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(CALL_FORM)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str) and arguments.strip():
        arguments = from_json("arguments", arguments)
    if not isinstance(arguments, dict) and arguments != "":
        raise ValueError(f"{CALL_FORM}, found arguments as {type(arguments).__name__}")


def read_content(content: Any) -> Any:
    """Return a content as text where it is a list of parts that are text, one a line. Raises ValueError if one is not.

    OpenAI's parts are `{"type": "text", "text": ...}`.
    """
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise ValueError(f'"content": text is expected, or parts of type text; found a part of type {kind}')
        texts.append(part["text"])
    return "\n".join(texts)


def read_tools(tools: Any) -> Tools:
    """Read the tools of a conversation, a list of JSON schemas; it, or each of them, may be spelled in JSON.

    Raises:
        ValueError: it is something else.
    """
    tools = None if isinstance(tools, str) and not tools.strip() else from_json("tools", tools)
    if isinstance(tools, list):
        tools = [from_json("tools", tool) for tool in tools]
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("expected tools as a list of JSON schemas")
    return tools or None


def read_history(history: Any) -> list[Message]:
    """Read the turns before an instruction: a list of pairs of question and answer.

    Raises:
        ValueError: it is something else.
    """
    pairs = [] if history is None else from_json("history", history)
    if not isinstance(pairs, list):
        raise ValueError("the field 'history': expected a list of [question, answer]")
    messages: list[Message] = []
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError("the field 'history': expected a list of [question, answer]")
        messages += instruction_messages(pair[0], "", pair[1])
    return messages


def with_system(system: str, messages: list[Message]) -> list[Message]:
    """Return messages that begin with a system message.

    Args:
        system: its text; "" for none.

    Raises:
        ValueError: they begin with another.
    """
    if not system:
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0].get("content") != system:
        raise ValueError("the field 'system' and the system message in 'messages' differ")
    return messages


def is_empty(message: Message) -> bool:
    """Return whether an assistant's message says and does nothing, of which nothing is to be learned."""
    says = (
        (message.get("content") or "").strip()
        or message.get("tool_calls")
        or any(message.get(name) for name in REASONING)
    )
    return message["role"] == "assistant" and not says


def texts(messages: list[Message]) -> Iterator[str]:
    """Yield the texts of messages."""
    for message in messages:
        yield message.get("content") or ""
        yield from (message[name] for name in REASONING if isinstance(message.get(name), str))


def spell_arguments(message: Message, wanted: str) -> Message:
    """Return a message with the arguments of its calls as "text", JSON, or as "object"; OpenAI has text.

    Raises:
        ValueError: the text is not JSON.
    """
    if not message.get("tool_calls"):
        return message

    def spell(function: dict[str, Any]) -> dict[str, Any]:
        arguments = function.get("arguments")
        if wanted == "object" and isinstance(arguments, str):
            arguments = from_json("arguments", arguments) if arguments.strip() else {}
        elif wanted == "text" and isinstance(arguments, dict):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return function | ({} if arguments is None else {"arguments": arguments})

    calls = [spell(call) if "function" not in call else call | {"function": spell(call["function"])}
             for call in message["tool_calls"]]  # fmt: skip
    return message | {"tool_calls": calls}
