"""Answers as OpenAI's API spells them: whole, or piece by piece as server-sent events."""

import json
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from lit_gpt.serving.scheduler import Piece, TokenLogprobs
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.tool_calls import parse_calls


@dataclass
class Choice:
    """One of a request's answers, as far as it has come."""

    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: str | None = None
    tokens: int = 0

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.logprobs += piece.logprobs
        self.finish, self.tokens = piece.finish, piece.tokens


class Reply:
    """The reply to one request.

    Args:
        chat: whether it is to a chat, else to texts to be continued.
        logprobs: whether to tell log-probabilities.
        prompt_tokens: of all prompts together.
        tools: names of those that the answers may call. An answer that may comes whole also in a stream, since how it
            goes on decides whether its beginning is text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        model: str,
        chat: bool,
        n: int,
        logprobs: bool,
        prompt_tokens: int,
        tools: Collection[str] = (),
    ) -> None:
        self.tokenizer, self.model, self.chat, self.logprobs = tokenizer, model, chat, logprobs
        self.prompt_tokens, self.tools = prompt_tokens, tools
        self.choices = [Choice() for _ in range(n)]
        self.id, self.created = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}", int(time.time())

    @property
    def finished(self) -> bool:
        return all(choice.finish for choice in self.choices)

    def whole(self) -> dict[str, Any]:
        """Return the reply when all answers have ended."""
        kind, choices = "chat.completion" if self.chat else "text_completion", []
        for index, choice in enumerate(self.choices):
            said, finish = self._said(choice)
            content = {"message": {"role": "assistant", **said}} if self.chat else {"text": choice.text}
            told = self._told(choice.logprobs, 0) if self.logprobs else None
            choices.append({"index": index, **content, "logprobs": told, "finish_reason": finish})
        return self._frame(kind, choices) | {"usage": self.usage()}

    def opening(self, index: int) -> str:
        """Return the event with which an answer of a chat begins."""
        return self._event(index, {"delta": {"role": "assistant", "content": ""}}, None, None)

    def _said(self, choice: Choice) -> tuple[dict[str, Any], str | None]:
        """Return the content and calls of a chat's answer, and why it ended."""
        text, calls = parse_calls(choice.text, self.tools) if self.tools else (choice.text, [])
        if not calls:
            return {"content": text}, choice.finish
        spelled = [
            {"index": i, "id": f"call_{secrets.token_hex(12)}", "type": "function", "function": call._asdict()}
            for i, call in enumerate(calls)
        ]
        return {"content": text or None, "tool_calls": spelled}, "tool_calls" if choice.finish == "stop" else "length"

    def event(self, index: int, piece: Piece) -> str:
        """Return the event of a piece, which has been added to its choice; "" while nothing is to be told of it."""
        if self.tools:
            return self._whole_event(index) if piece.finish else ""
        content: dict[str, Any] = {"text": piece.text}
        if self.chat:
            content = {"delta": {"content": piece.text} if piece.text else {}}
        before = len(self.choices[index].text) - len(piece.text)
        told = self._told(piece.logprobs, before) if self.logprobs else None
        return self._event(index, content, told, piece.finish)

    def _whole_event(self, index: int) -> str:
        choice = self.choices[index]
        said, finish = self._said(choice)
        return self._event(index, {"delta": said}, self._told(choice.logprobs, 0) if self.logprobs else None, finish)

    def closing(self, include_usage: bool) -> str:
        """Return the last events."""
        usage = self._frame(self._chunk, []) | {"usage": self.usage()}
        return (event(usage) if include_usage else "") + "data: [DONE]\n\n"

    def usage(self) -> dict[str, int]:
        new = sum(choice.tokens for choice in self.choices)
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": new, "total_tokens": self.prompt_tokens + new}

    @property
    def _chunk(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _event(self, index: int, content: dict[str, Any], told: dict[str, Any] | None, finish: str | None) -> str:
        choice = {"index": index, **content, "logprobs": told, "finish_reason": finish}
        return event(self._frame(self._chunk, [choice]))

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _told(self, logprobs: list[TokenLogprobs], start: int) -> dict[str, Any]:
        """Return log-probabilities as the API has them, from the `start`-th character of the answer on."""
        if self.chat:
            return {"content": [self._token(x) | {"top_logprobs": self._top(x)} for x in logprobs], "refusal": None}
        texts, offsets = [self._text(x.token) for x in logprobs], []
        for text in texts:
            offsets.append(start)
            start += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [x.logprob for x in logprobs],
            "top_logprobs": [{self._text(token): value for token, value in x.top} for x in logprobs],
            "text_offset": offsets,
        }

    def _token(self, x: TokenLogprobs) -> dict[str, Any]:
        text = self._text(x.token)
        # a part of a character has no text of its own
        return {"token": text, "logprob": x.logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    def _top(self, x: TokenLogprobs) -> list[dict[str, Any]]:
        return [self._token(TokenLogprobs(token, value, [])) for token, value in x.top]

    def _text(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special_tokens=False)


def event(contents: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(contents)}\n\n"  # in ASCII: some clients end a line at U+2028 too
