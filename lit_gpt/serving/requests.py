"""Reads the bodies of requests: OpenAI's fields and vLLM's names for what OpenAI lacks."""

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any

from lit_gpt.generation.sampling import Sampling
from lit_gpt.serving.errors import APIError, bad
from lit_gpt.text.messages import Message, Tools, read_messages

# Fields that change no answer.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
# Fields that are known, with the values that ask for nothing: others are refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "functions": ([],),
    "tool_choice": ("none", "auto"), "suffix": ("",), "echo": (False,),
    "best_of": (1,), "modalities": (["text"],),
}  # fmt: skip
KNOWN = {
    "model", "messages", "prompt", "n", "stop", "seed", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "stream", "stream_options", "tools",
    "response_format",
}  # fmt: skip
MOST_CONTINUED = 16  # tokens, where a request names none: OpenAI's default
MOST_CHOICES, MOST_STOPS, MOST_LOGPROBS = 128, 16, 20


@dataclass(frozen=True)
class Asked:
    """A request, read.

    Attributes:
        messages: of a chat; None: it is to be continued.
        tools: that the answer may call, of a chat; None: none.
        prompts: texts or token ids to be continued; empty for a chat.
        max_tokens: of each answer; None: see new_tokens.
        logprobs: how many of the likeliest tokens to tell of at each place; None: no log-probabilities.
        schema: of the JSON that answers are held to; None: they are not.
    """

    model: str
    messages: list[Message] | None
    tools: Tools
    prompts: list[str | list[int]]
    n: int
    stop: list[str]
    seed: int
    sampling: Sampling
    max_tokens: int | None
    logprobs: int | None
    schema: dict[str, Any] | None
    stream: bool
    include_usage: bool

    def new_tokens(self, room: int) -> int:
        """Return how many tokens an answer may have where the context leaves room for so many."""
        default = room if self.messages else min(room, MOST_CONTINUED)
        return default if self.max_tokens is None else self.max_tokens


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the object that a body spells. Raises APIError if it spells none."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        fields = json.loads(body, parse_constant=refuse)
        json.dumps(fields, ensure_ascii=False).encode()  # JSON can spell half of an emoji
    except (ValueError, RecursionError) as error:
        raise APIError(400, f"the body is not JSON in UTF-8 ({type(error).__name__}: {error})") from None
    if not isinstance(fields, dict):
        raise APIError(400, f"the body: expected a JSON object, found {type(fields).__name__}")
    return {name: value for name, value in fields.items() if value is not None}


def read_request(fields: dict[str, Any], chat: bool) -> Asked:
    """Read what a body asks for. Raises APIError if a field is not known, or holds what is not expected."""
    check_names(fields, other="prompt" if chat else "messages")
    options = typed(fields, "stream_options", dict, "an object", {})
    most = number(fields, "max_completion_tokens", int, 1) or number(fields, "max_tokens", int, 1)
    return Asked(
        model=typed(fields, "model", str, "the name of a model", ""),
        messages=read_chat(fields) if chat else None,
        tools=read_functions(fields) if chat else None,
        prompts=[] if chat else read_prompts(fields),
        n=number(fields, "n", int, 1, MOST_CHOICES) or 1,
        stop=read_stops(fields),
        seed=read_seed(fields),
        sampling=read_sampling(fields),
        max_tokens=most,
        logprobs=read_logprobs(fields, chat),
        schema=read_format(fields),
        stream=typed(fields, "stream", bool, "true or false", False),
        include_usage=typed(options, "include_usage", bool, "true or false", False),
    )


def read_name(fields: dict[str, Any]) -> str:
    """Return the LoRA that a body names. Raises APIError if it says something else: no path comes from a request."""
    for name in fields.keys() - {"lora_name"}:
        raise APIError(400, f"{name[:80]}: expected lora_name alone, a file of --loras_dir", name[:80])
    return typed(fields, "lora_name", str, "the name of a LoRA", "")


def check_names(fields: dict[str, Any], other: str) -> None:
    """Refuse fields that are not known, or not by this route, as `other` is not."""
    for name, value in fields.items():
        if name in NEUTRAL and value not in NEUTRAL[name]:
            raise APIError(400, f"{name}: is not served here; leave it out", name, "unsupported_parameter")
        if name == other or name not in NEUTRAL and name not in KNOWN and name not in IGNORED:
            raise APIError(400, f"{name[:80]}: no such field is known here", name[:80], "unknown_parameter")


def typed(fields: dict[str, Any], name: str, kind: type, expected: str, default: Any) -> Any:
    if not isinstance(fields.get(name, default), kind):
        raise bad(name, expected)
    return fields.get(name, default)


def number(fields: dict[str, Any], name: str, kind: type, low: float, high: float = float("inf")) -> Any:
    """Return a number from `low` to `high`, or None where there is none."""
    value = fields.get(name)
    if value is None:
        return None
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    right = isinstance(value, int) and not isinstance(value, bool) or isinstance(value, float) and isfinite(value)
    if not right or (kind is int and not whole) or not low <= value <= high:
        span = f"{low:g} or more" if high == float("inf") else f"from {low:g} to {high:g}"
        raise bad(name, f"a {'whole ' if kind is int else ''}number, {span}")
    return kind(value)


def read_sampling(fields: dict[str, Any]) -> Sampling:
    top_k = number(fields, "top_k", int, -1)
    given = {
        "temperature": number(fields, "temperature", float, 0, 2),
        "top_p": number(fields, "top_p", float, 0, 1),
        "min_p": number(fields, "min_p", float, 0, 1),
        "repetition_penalty": number(fields, "repetition_penalty", float, 0.01, 100),
        "top_k": top_k if top_k and top_k > 0 else None,  # -1 and 0 stand for all
    }
    return Sampling(**{name: value for name, value in given.items() if value is not None})


def read_format(fields: dict[str, Any]) -> dict[str, Any] | None:
    """Return the JSON schema that answers are held to, if they are."""
    format = typed(fields, "response_format", dict, "an object", {"type": "text"})
    wanted = format.get("json_schema")
    named = wanted.get("schema") if isinstance(wanted, dict) else None
    schema = {"type": "object"} if format.get("type") == "json_object" else named
    if format.get("type") == "text":
        return None
    if format.get("type") not in ("json_object", "json_schema") or not isinstance(schema, dict):
        expected = '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}'
        raise bad("response_format", f'{{"type": "text"}}, {{"type": "json_object"}} or {expected}')
    return schema


def read_seed(fields: dict[str, Any]) -> int:
    seed = number(fields, "seed", int, -(2**63), 2**63)
    return secrets.randbits(63) if seed is None else seed % 2**63


def read_stops(fields: dict[str, Any]) -> list[str]:
    stops = fields.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    if not list_of(stops, lambda stop: isinstance(stop, str) and 0 < len(stop) <= 1000) or len(stops) > MOST_STOPS:
        raise bad("stop", f"a text that is not empty, or at most {MOST_STOPS} such texts")
    return stops


def read_logprobs(fields: dict[str, Any], chat: bool) -> int | None:
    if not chat:
        return number(fields, "logprobs", int, 0, MOST_LOGPROBS)
    wanted = typed(fields, "logprobs", bool, "true or false", False)
    top = number(fields, "top_logprobs", int, 0, MOST_LOGPROBS)
    if top and not wanted:
        raise bad("top_logprobs", "logprobs true beside it")
    return (top or 0) if wanted else None


def read_chat(fields: dict[str, Any]) -> list[Message]:
    messages = fields.get("messages")
    try:
        return read_messages([flat(message) for message in messages] if isinstance(messages, list) else None)
    except ValueError as error:
        raise APIError(400, str(error), "messages", "invalid_value") from None


def read_functions(fields: dict[str, Any]) -> Tools:
    """Return the tools, as OpenAI has them, that an answer may call; None where it is to call none."""
    tools = fields.get("tools", [])
    if not list_of(tools, is_function):
        raise bad("tools", 'a list of {"type": "function", "function": {"name": ..., "parameters": ...}}')
    return None if fields.get("tool_choice") == "none" else tools or None


def is_function(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def flat(message: Any) -> Any:
    """Return a message with its parts of text as one text, and a developer's as the system's.

    Raises:
        ValueError: there are parts of another kind.
    """
    if not isinstance(message, dict):
        return message
    parts = message.get("content")
    if isinstance(parts, list):
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
            raise ValueError("expected content as text, or as parts of the type text")
        message = message | {"content": "".join(part["text"] for part in parts)}
    return message | {"role": "system"} if message.get("role") == "developer" else message


def read_prompts(fields: dict[str, Any]) -> list[str | list[int]]:
    prompt: Any = fields.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) or list_of(prompt, is_id) else prompt
    good = list_of(prompts, lambda one: isinstance(one, str) or (list_of(one, is_id) and len(one) > 0))
    if not good or not 0 < len(prompts) <= MOST_CHOICES:
        raise bad("prompt", f"a text or token ids, or at most {MOST_CHOICES} of either")
    return prompts


def is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def list_of(value: Any, right: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(right, value))
