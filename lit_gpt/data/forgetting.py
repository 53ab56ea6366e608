"""Reads a probe for forgetting: rows that a finetune does not train on, with a loss before and after it."""

import hashlib
from pathlib import Path

import torch

from lit_gpt.data import dataset, packing
from lit_gpt.data.args import ColumnArgs
from lit_gpt.data.conversations import BadRow, to_conversation
from lit_gpt.data.sources import Row, Source
from lit_gpt.errors import UserError
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.text.tokenizer import Tokenizer

FORMS = "; expected 'text', 'messages', or 'instruction' and 'output'"
WINDOW = 1024  # tokens: the longest piece of a text, and about what is computed at once


class Probe:
    """Makes samples of the rows of a file: {"text": ...}, {"messages": [...]} or another form of training rows.

    In a text every token is supervised that has one before it; a long text is cut into pieces that share one token. In
    messages the answers are supervised, as in training, within the first `limit` tokens, which the model takes.

    Raises:
        UserError: a row has none of these forms, or nothing is supervised.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, style: PromptStyle, limit: int) -> None:
        self.tokenizer, self.style, self.limit = tokenizer, style, limit
        self.cut = self.dropped = 0  # conversations that lost their end; those without an answer to learn
        self.samples = [sample for row in Source(str(path)).rows() for sample in self.samples_of(row)]
        self.lengths = [len(sample.tokens) for sample in self.samples]
        self.supervised_tokens = packing.supervised_count(self.samples)
        if not self.supervised_tokens:
            raise UserError(f"--probe_path {path}: has no token to predict; expected texts, or messages with answers")
        self.tokens = torch.cat([sample.tokens for sample in self.samples])
        supervised = torch.cat([sample.supervised for sample in self.samples])
        contents = (supervised, self.tokens, torch.tensor(self.lengths))
        self.fingerprint = hashlib.sha256(b"".join(t.numpy().tobytes() for t in contents)).hexdigest()[:16]

    def samples_of(self, row: Row) -> list[dataset.Sample]:
        """Return the samples that a row gives."""
        try:
            conversation = to_conversation(row, ColumnArgs(), FORMS)
        except BadRow as error:
            raise UserError(f"--probe_path {error}") from None
        if conversation.plain:
            return self.pieces(row.fields["text"])
        try:
            encoded = self.style.encode_sample(conversation.messages, self.tokenizer, conversation.tools)
        except UserError as error:
            raise UserError(f"--probe_path {row.where}: {error}") from None
        self.cut += len(encoded.ids) > self.limit
        ids = torch.tensor(encoded.ids[: self.limit], dtype=torch.int32)
        supervised = torch.tensor(encoded.supervised[: self.limit], dtype=torch.uint8)
        if supervised[1:].any():
            return [dataset.Sample(ids, supervised)]
        self.dropped += 1
        return []

    def pieces(self, text: str) -> list[dataset.Sample]:
        """Cut a text into samples."""
        ids, window = self.tokenizer.encode(text).to(torch.int32), min(WINDOW, self.limit)
        pieces = [ids[i : i + window] for i in range(0, len(ids) - 1, window - 1)]
        return [dataset.Sample(piece, torch.ones(len(piece), dtype=torch.uint8)) for piece in pieces]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> dataset.Sample:
        return self.samples[i]

    def describe(self) -> str:
        """Return what the probe measures and leaves out, in words."""
        lost = f"{self.cut} conversations cut, {self.dropped} without an answer"
        return f"{self.supervised_tokens:,} supervised tokens; {lost}"
