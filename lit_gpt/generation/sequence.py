"""A sequence that is being continued, and the step that adds one token to each of several."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lit_gpt.generation.sampling import Sampling
from lit_gpt.model.gpt import GPT
from lit_gpt.model.kv_cache import KVCache


class Constraint(Protocol):
    """Says which tokens may follow."""

    def allow(self, logits: Tensor) -> Tensor:
        """Return the logits (vocabulary,) with those of tokens that may not follow at minus infinity."""

    def take(self, token: int) -> None:
        """Go on behind a token."""


@dataclass(eq=False)
class DecodingRow:
    """A sequence that is being continued."""

    ids: list[int]  # its tokens, of the prompt at first; at least one
    remaining: int  # tokens that may still follow; set to 0, it ends
    generator: torch.Generator | None = None  # of the sampling, on the model's device; None: torch's own
    cached: int = 0  # beginning of the prompt that its slot in the cache holds already
    lora: int = 0  # see lit_gpt.methods.multi_lora
    sampling: Sampling = Sampling()
    constraint: Constraint | None = None
    observe: Callable[[Tensor, int], None] | None = None  # is shown the logits from which a token was drawn, and it
    cache: KVCache = field(default_factory=list)  # its slot


class Step(Protocol):
    """Adds one token to each of several rows."""

    def __call__(self, rows: list[DecodingRow], cache: KVCache, /) -> Tensor:
        """Return the logits that follow each row, (rows, padded_vocab_size), which the next call may overwrite.

        Args:
            rows: the slot of each in the cache holds all of its tokens but the last, which is added.
            cache: several rows have its first slots.
        """


@runtime_checkable
class DrawingStep(Step, Protocol):
    """A Step that can draw the tokens itself, on the device, and need not wait for them before it goes on."""

    def draw(self, rows: list[DecodingRow], cache: KVCache, /) -> list[int] | None:
        """Return the token that follows each row, as its `sampling` says; None: this model is not served so."""


def eager_step(model: GPT, rows: list[DecodingRow], cache: KVCache) -> Tensor:
    """Take a Step by the model's own operations. A row alone may have more tokens that its slot does not hold."""
    device = model.wte.weight.device
    if len(rows) == 1:
        slot = rows[0].cache
        idx = torch.tensor([rows[0].ids[slot[0].length :]], device=device)
        return model(idx, cache=slot, last=True)[:, -1]
    idx = torch.tensor([row.ids[-1:] for row in rows], device=device)
    lengths = tuple(len(row.ids) for row in rows)
    positions = torch.tensor(lengths, device=device) - 1
    logits = model(idx, cache=[layer.decoding(len(rows), positions, lengths) for layer in cache], last=True)
    for row in rows:
        for layer in row.cache:
            layer.length += 1
    return logits[:, -1]
