"""Which tokens of a rendered conversation are to be supervised: the assistant's turns, each from where generation would
begin up to and with its end token.

The conversation is rendered and tokenized once, whole. Where a turn lies in its text follows from rendering the
messages before it as a prompt, and those up to it; where the template renders these otherwise, from a rendering in
which the turn's content stands between marks. A turn that the template does not show in full is not supervised.
"""

import json
import secrets
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.text.messages import REASONING, Message
from lit_gpt.text.tokenizer import Encoding, Tokenizer

Render = Callable[..., str]  # of messages; with answer=True as a prompt, up to where the assistant answers
MARKS = tuple(f"\U0010fffd{secrets.token_hex(8)}{end}\U0010fffd" for end in "<>")
BEGIN, END = itemgetter(0), itemgetter(1)


@dataclass(frozen=True)
class Turn:
    """Where an assistant's turn lies in the text of its conversation, in characters."""

    start: int  # where generation would begin
    end: int  # where the content ends
    limit: int  # the end token begins here at the latest
    train: bool  # whether it is to be supervised
    prompt_mismatch: bool  # the text before it is not what generation would see


@dataclass(frozen=True)
class Rendered:
    """A conversation's text.

    Attributes:
        turns: of the assistant; None for one that the template does not show in full.
        generated: the stretches that the template marks as generated, from and to which character; None: no marks.
        content_dropped: the template does not show some other message, or a tool.
    """

    text: str
    turns: list[Turn | None]
    generated: list[tuple[int, int]] | None
    content_dropped: bool


@dataclass(frozen=True)
class Answer:
    """An assistant's turn among the tokens: from its first token to its end token, exclusive."""

    start: int
    stop: int
    train: bool
    prompt_mismatch: bool


@dataclass(frozen=True)
class Encoded:
    """A conversation's tokens.

    Attributes:
        supervised: whether each token is one of an assistant's turn that is to be supervised.
        not_verbatim: how many turns the template does not show in full; they are not among `answers`.
    """

    ids: list[int]
    answers: list[Answer]
    supervised: list[bool]
    not_verbatim: int
    content_dropped: bool


def find_turn(messages: Sequence[Message], i: int, text: str, render: Render) -> Turn | None:
    """Find where the text of all messages shows the assistant's message i; None: not in full."""
    prompt = attempt(render, messages[:i], answer=True)
    closed = text if i + 1 == len(messages) else attempt(render, messages[: i + 1])
    content = (messages[i].get("content") or "").strip()
    begin = len(prompt) if prompt is not None and text.startswith(prompt) else None  # of the answer
    if begin is not None and closed is not None and text.startswith(closed) and begin <= len(closed):
        start = end = begin
        limit, at = len(closed), text.find(content, start, len(closed))
        end = start if at < 0 else at + len(content)
    elif place := find_content(messages, i, text, render):
        start, end = place
        start = begin if begin is not None and begin <= start else start
        limit = end + len(text[end:]) - len(text[end:].lstrip())
    else:
        return None
    said = text[start:limit] if start != begin else begun(content, text[:start]) + text[start:limit]
    if not shown(parts(messages[i]), said):
        return None
    train = messages[i].get("train", messages[i].get("weight", 1))
    return Turn(start, end, limit, bool(train), prompt_mismatch=begin is None)


def begun(content: str, prompt: str) -> str:
    """Return how far the prompt has written the content already, such as the tag that opens its reasoning.

    Blanks apart; never all of it.
    """
    content, prompt = squeeze(content), squeeze(prompt)
    ends = (content[:length] for length in range(len(content) - 1, 0, -1))
    return next((beginning for beginning in ends if prompt.endswith(beginning)), "")


def find_content(messages: Sequence[Message], i: int, text: str, render: Render) -> tuple[int, int] | None:
    """Find from and to which character the text shows the content of message i, by rendering it between marks."""
    content = messages[i].get("content")
    if content is None:
        return None
    for core in dict.fromkeys((content, content.strip())):  # a template may strip what stands around it
        marked = content.replace(core, core.join(MARKS), 1) if core else "".join(MARKS) + content
        whole = attempt(render, [*messages[:i], {**messages[i], "content": marked}, *messages[i + 1 :]])
        pieces = (whole or "").replace(MARKS[1], MARKS[0]).split(MARKS[0])
        if len(pieces) == 3 and "".join(pieces) == text:
            return len(pieces[0]), len(pieces[0]) + len(pieces[1])
    return None


def attempt(render: Render, messages: Sequence[Message], **options: Any) -> str | None:
    """Return the text of messages, or None if the template refuses them."""
    try:
        return render(messages, **options)
    except UserError:
        return None


def parts(message: Message) -> Iterator[str]:
    """Yield the texts of a message, which its rendering must show."""
    if "instruction" in message:
        yield from (message["instruction"], message.get("input") or "")
    else:
        yield message.get("content") or ""
    yield next((message[name] for name in REASONING if isinstance(message.get(name), str)), "")
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        yield function["name"]
        yield from texts(function.get("arguments"))


def texts(arguments: Any) -> Iterator[str]:
    """Yield the texts among the arguments of a call, which are given as such or spelled in JSON."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            yield arguments
            return
    values = arguments.values() if isinstance(arguments, dict) else arguments if isinstance(arguments, list) else ()
    for value in values:
        if isinstance(value, str):
            yield value
        else:
            yield from texts(value)


def shown(parts: Iterable[str], text: str) -> bool:
    """Return whether the text holds the parts, blanks apart, each as it is or as JSON spells it."""
    text = squeeze(text)
    return all(
        squeeze(part) in text or any(squeeze(json.dumps(part, ensure_ascii=a)[1:-1]) in text for a in (False, True))
        for part in parts
    )


def squeeze(text: str) -> str:
    return "".join(text.split())


def encode(rendered: Rendered, encoding: Encoding, tokenizer: Tokenizer, stop_ids: Sequence[int]) -> Encoded:
    """Decide which of the text's tokens are to be supervised."""
    answers = [find_answer(turn, rendered.text, encoding, tokenizer, stop_ids) for turn in rendered.turns if turn]
    supervised = [False] * len(encoding.ids)
    for answer in answers:
        if answer.train:
            for i in supervised_ids(answer, rendered, encoding, stop_ids):
                supervised[i] = True
    return Encoded(encoding.ids, answers, supervised, rendered.turns.count(None), rendered.content_dropped)


def find_answer(turn: Turn, text: str, encoding: Encoding, tokenizer: Tokenizer, stop_ids: Sequence[int]) -> Answer:
    """Find a turn's tokens."""
    ids, offsets = encoding
    first = bisect_left(offsets, turn.start, key=BEGIN)
    while first and offsets[first - 1][1] > turn.start:  # a token in which prompt and answer are one
        first -= 1
    stop = bisect_right(offsets, turn.limit, lo=first, key=END)
    for i in range(bisect_left(offsets, turn.end, key=BEGIN), len(ids)):
        if offsets[i][0] > turn.limit:
            break
        if ids[i] in stop_ids:  # what the template writes after it is never generated
            stop = i + 1
            break
    same = not turn.prompt_mismatch and same_tokens(text, turn.start, encoding, first, tokenizer)
    return Answer(first, max(first, stop), turn.train, prompt_mismatch=not same)


def same_tokens(text: str, stop: int, encoding: Encoding, first: int, tokenizer: Tokenizer) -> bool:
    """Return whether the text up to `stop` alone makes the tokens that it makes in the whole, those before `first`.

    It need not: what follows can join its last token, or split its last blanks otherwise. Nothing reaches over an added
    token, so that only what follows the last of them is tokenized again.
    """
    ids, offsets = encoding
    last = next((i for i in reversed(range(first)) if ids[i] in tokenizer.added_tokens), None)
    if last is None:
        return ids[:first] == prompt_ids(tokenizer, text[:stop])
    begin, end = offsets[last]
    known = [ids[last]] if end > begin else []  # else it is the BOS, which the text lacks
    return known + ids[last + 1 : first] == prompt_ids(tokenizer, text[begin:stop])


@lru_cache(maxsize=256)
def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return next(tokenizer.encode_batch([text], bos=False)).ids


def supervised_ids(answer: Answer, rendered: Rendered, encoding: Encoding, stop_ids: Sequence[int]) -> list[int]:
    """Return the places of a turn's supervised tokens: those that the template marks, if it does, and the end token."""
    span = list(range(answer.start, answer.stop))
    if rendered.generated is None:
        return span
    offsets = encoding.offsets
    end = span[-1:] if span and encoding.ids[span[-1]] in stop_ids else []
    marked: set[int] = set()
    for a, b in rendered.generated:
        if span and a <= offsets[span[-1]][1] and b >= offsets[span[0]][0]:
            marked.update([i for i in span if offsets[i][0] < b and offsets[i][1] > a] + end)
    return sorted(marked)
