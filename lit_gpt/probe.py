"""A probe for forgetting: rows that a finetune does not train on, and whose loss is measured before and after it."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from lit_gpt import data
from lit_gpt.errors import UserError
from lit_gpt.prepare import read_messages
from lit_gpt.prompts import PromptStyle
from lit_gpt.rows import Source
from lit_gpt.tokenizer import Tokenizer

WINDOW = 1024  # tokens: the longest piece of a text, and about what is computed at once


class Probe(Sequence[data.Sample]):
    """The rows of a .json, .jsonl or .csv file: {"text": ...} or {"messages": [...]}.

    Of a text every token is supervised that has one before it; a long one is cut into pieces that share one token. Of
    messages the answers are supervised, as in training, within the first `limit` tokens, which the model takes.

    Raises:
        UserError: a row is neither, or nothing is supervised.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, style: PromptStyle, limit: int) -> None:
        window, kept, cut, dropped = min(WINDOW, limit), [], 0, 0
        for where, row, problem in Source(str(path)).rows():
            if problem:
                raise UserError(f"--probe_path {where}: {problem}")
            if isinstance(row.get("text"), str):
                ids = tokenizer.encode(row["text"]).to(torch.int32)
                pieces = [ids[i : i + window] for i in range(0, len(ids) - 1, window - 1)]
                kept += [data.Sample(piece, torch.ones(len(piece), dtype=torch.uint8)) for piece in pieces]
            elif "messages" in row:
                try:
                    encoded = style.encode_sample(read_messages(row["messages"]), tokenizer)
                except ValueError as error:
                    raise UserError(f"--probe_path {where}: {error}") from None
                cut += len(encoded.ids) > limit
                if not any(encoded.learnt[1:limit]):
                    dropped += 1
                    continue
                ids, learnt = torch.tensor(encoded.ids[:limit]), torch.tensor(encoded.learnt[:limit])
                kept.append(data.Sample(ids.to(torch.int32), learnt.to(torch.uint8)))
            else:
                raise UserError(f"--probe_path {where}: expected the field 'text', with text, or 'messages'")
        self.samples = kept
        self.lengths = [len(sample.tokens) for sample in kept]
        self.supervised_tokens = data.supervised_count(self.samples)
        if not self.supervised_tokens:
            raise UserError(f"--probe_path {path}: has no token to predict; expected texts, or messages with answers")
        self.tokens = torch.cat([sample.tokens for sample in kept])
        self.lost = cut, dropped
        contents = (torch.cat([sample.supervised for sample in kept]), self.tokens, torch.tensor(self.lengths))
        self.fingerprint = hashlib.sha256(b"".join(t.numpy().tobytes() for t in contents)).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> data.Sample:
        return self.samples[i]

    def describe(self) -> str:
        cut, dropped = self.lost
        return f"{self.supervised_tokens:,} supervised tokens; {cut} conversations cut, {dropped} without an answer"
