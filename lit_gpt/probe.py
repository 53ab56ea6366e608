"""A probe for forgetting: rows that a finetune does not train on, and whose loss is measured before and after it."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from lit_gpt import data
from lit_gpt.errors import UserError
from lit_gpt.prepare import check_messages, read_rows
from lit_gpt.prompts import PromptStyle
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
        split, window = data.Split(), min(WINDOW, limit)
        for where, row in read_rows(path):
            if isinstance(row.get("text"), str):
                ids = tokenizer.encode(row["text"]).to(torch.int32)
                pieces = [ids[i : i + window] for i in range(0, len(ids) - 1, window - 1)]
                split.tokens += pieces
                split.supervised += [torch.ones(len(piece), dtype=torch.uint8) for piece in pieces]
            elif "messages" in row:
                messages = check_messages(where, row["messages"])
                data.add_sample(split, messages, tokenizer, style, limit, mask_inputs=True, allow_unsupervised=True)
            else:
                raise UserError(f"--probe_path {where}: expected the field 'text', with text, or 'messages'")
        self.samples = [data.Sample(*pair) for pair in zip(split.tokens, split.supervised, strict=True)]
        self.lengths = [len(ids) for ids in split.tokens]
        self.supervised_tokens = data.supervised_count(self.samples)
        if not self.supervised_tokens:
            raise UserError(f"--probe_path {path}: has no token to predict; expected texts, or messages with answers")
        self.tokens = torch.cat(split.tokens)
        self.lost = split.audit.truncated, sum(split.audit.dropped.values())
        contents = (torch.cat(split.supervised), self.tokens, torch.tensor(self.lengths))
        self.fingerprint = hashlib.sha256(b"".join(t.numpy().tobytes() for t in contents)).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> data.Sample:
        return self.samples[i]

    def describe(self) -> str:
        cut, dropped = self.lost
        return f"{self.supervised_tokens:,} supervised tokens; {cut} conversations cut, {dropped} without an answer"
