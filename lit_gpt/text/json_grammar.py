"""Holds answers to JSON: at each place only such tokens may be drawn as lead to a text of the schema (llguidance)."""

import json
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt.errors import UserError, reason, require
from lit_gpt.files import read_text
from lit_gpt.text.tokenizer import Tokenizer

Schema = dict[str, Any]  # of JSON

# One way to set things apart (a JsonCompileOptions), or a small model may write white space without end.
SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class JSONGrammars:
    """Makes what holds the answers of a model to a schema.

    Args:
        vocabulary: rows of the model's head.
        wanted_by: the flag or script that needs llguidance.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, wanted_by: str) -> None:
        self.tokenizer, self.vocabulary, self.wanted_by = tokenizer, vocabulary, wanted_by
        self.tokens: dict[tuple[int, ...], Any] = {}  # by those that end an answer; making one takes a second
        self.making = threading.Lock()

    def held_to(self, schema: Schema, stop_ids: tuple[int, ...]) -> "JSONText":
        """Return what holds one answer to a JSON schema; {"type": "object"} is any object.

        Raises:
            UsageError: llguidance is not installed.
            ValueError: it is no schema, or has a keyword that nothing can be held to; or no token ends an answer.
        """
        require("llguidance", "serve", self.wanted_by)
        from llguidance import LLMatcher, LLTokenizer

        if not stop_ids:
            raise ValueError("the prompt style has no token that ends an answer")
        with self.making:
            if stop_ids not in self.tokens:
                spelled, ends = self.tokenizer.as_json(), list(stop_ids)
                self.tokens[stop_ids] = LLTokenizer(spelled, n_vocab=self.vocabulary, eos_token=ends)
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=SPACING)
        matcher = LLMatcher(self.tokens[stop_ids], grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(" ".join(matcher.get_error().split())[:300])
        return JSONText(matcher, stop_ids)


def read_schema(path: Path) -> Schema:
    """Read a JSON schema. Raises UserError if the file cannot be read, or holds none."""
    try:
        schema = json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise UserError(f"--json_schema {path}: cannot be read ({reason(error)})") from None
    if not isinstance(schema, dict):
        raise UserError(f"--json_schema {path}: expected a JSON schema, an object, found {type(schema).__name__}")
    return schema


class JSONText:
    """A text of JSON as it grows, token by token."""

    def __init__(self, matcher: Any, stop_ids: tuple[int, ...]) -> None:
        self.matcher, self.stop_ids = matcher, stop_ids

    def allow(self, logits: Tensor) -> Tensor:
        """Return the logits (vocabulary,) with those of tokens that may not follow at minus infinity."""
        refused = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8) == 0
        if self.matcher.is_error() or refused.all():  # beyond the library's limits: it ends here
            refused = torch.ones_like(refused).index_fill_(0, torch.tensor(self.stop_ids), False)
        return logits.masked_fill(refused.to(logits.device), -torch.inf)

    def take(self, token: int) -> None:
        """Go on behind a token."""
        self.matcher.consume_token(token)
