"""Perplexity: how well a model predicts a text, or the supervised tokens of prepared data."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.data import packing
from lit_gpt.data.dataset import Dataset, prefixed, read_meta
from lit_gpt.errors import UsageError, UserError, reason
from lit_gpt.evaluation.args import PerplexityArgs
from lit_gpt.files import read_text
from lit_gpt.hardware import DTYPES, choose_device
from lit_gpt.methods.finetuned_model import load_finetuned
from lit_gpt.model.gpt import GPT
from lit_gpt.model.packed_inputs import Targets
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.training.objectives import SupervisedFinetuning


@dataclass(frozen=True)
class Score:
    """Cross-entropy over scored tokens."""

    nats: float  # summed
    tokens: int

    @property
    def loss(self) -> float:
        """Return the nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    def __add__(self, other: "Score") -> "Score":
        return Score(self.nats + other.nats, self.tokens + other.tokens)


def evaluate(args: PerplexityArgs) -> Score:
    """Return the score of what the flags of eval/perplexity.py name, which is read before the model is loaded.

    Raises:
        UserError: the model, the text or the data cannot be read, or the text is too short.
        UsageError: the window or the context is not one for this model.
    """
    tokenizer, place = Tokenizer(args.checkpoint_dir), (DTYPES[args.precision], choose_device(args.device))
    if args.data_dir:
        read_meta(args.data_dir, tokenizer)
        data = Dataset(args.data_dir, args.split or "validation")
    elif args.text_path:
        ids = read_ids(args.text_path, tokenizer)
    if args.finetuned_path:
        model, _ = load_finetuned(args.checkpoint_dir, args.finetuned_path, None, *place, args.quantize)
    else:
        model = load_model(args.checkpoint_dir, *place, args.quantize)
    if args.data_dir:
        return score_data(model, data, args.samples)
    length = args.window or min(2048, model.config.block_size)
    return score_text(model, ids, length, args.context or length // 2)


def read_ids(path: Path, tokenizer: Tokenizer) -> Tensor:
    """Read the token ids of a text, at least two."""
    try:
        ids = tokenizer.encode(read_text(path))
    except OSError as error:
        raise UserError(f"--text_path {path}: cannot be read ({reason(error)})") from None
    if len(ids) < 2:
        raise UserError(f"--text_path {path}: holds fewer than two tokens: nothing to predict; give more text")
    return ids


class Window(NamedTuple):
    """Tokens from `start` to `stop` are fed, those from `first` on are scored."""

    start: int
    first: int
    stop: int


def windows(n: int, length: int, context: int) -> Iterator[Window]:
    """Yield windows over n tokens: each but the first is scored once, after `context` tokens or more, or all there are.

    Args:
        length: tokens of a window, above `context`.
    """
    scored = 1  # the first has nothing to be predicted from
    while scored < n:
        start = max(0, scored - context)
        stop = min(n, start + length)
        yield Window(start, scored, stop)
        scored = stop


@torch.no_grad()
def score_text(model: GPT, ids: Tensor, length: int, context: int) -> Score:
    """Return the score of a text as one stream of tokens.

    Args:
        ids: int64 (n,), at least two.
        length: tokens of a window; at most one more than the model's context, for the last one predicts nothing.
        context: tokens that each scored one is to have before it, where the text has them.
    """
    virtual = torch.tensor(model.virtual_tokens, dtype=torch.long)
    if length > (most := model.config.block_size + 1 - len(virtual)):
        raise UsageError(f"--window {length}: expected {most} or less, which this model takes")
    if not 1 <= context < length:
        raise UsageError(f"--context {context} --window {length}: expected a context of 1 or more, below the window")
    total = Score(0.0, 0)
    ids, virtual = ids.to(model.wte.weight.device), virtual.to(model.wte.weight.device)
    for start, first, stop in windows(len(ids), length, context):
        at = torch.arange(first - 1 - start, stop - 1 - start, device=ids.device) + len(virtual)
        fed = torch.cat((virtual, ids[start : stop - 1]))
        nats = model(fed.unsqueeze(0), targets=Targets(at, ids[first:stop])).item()
        total += Score(nats, stop - first)
    return total


def score_data(model: GPT, dataset: Dataset, samples: int | None = None, row_tokens: int = 1024) -> Score:
    """Return the score of prepared data's supervised tokens, each sample on its own; its loss is the validation loss.

    Args:
        samples: the first this many; None: all.
        row_tokens: of a packed row, which holds at least one sample.
    """
    indices, data = list(range(len(dataset)))[:samples], prefixed(dataset, model.virtual_tokens)
    parts = packing.micro_batches(indices, data.lengths, None, row_tokens)
    rows = ([data[i] for i in part] for part in parts)
    return Score(*SupervisedFinetuning().score(model, rows, model.wte.weight.device))
