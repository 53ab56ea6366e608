"""What an attached module may add to a decoding tape, so that the fast decoding step computes it.

A module that a method attaches defines `record`: in place of a linear layer `record(tape, x, name)`, in place of a norm
`record(tape, x, name, parts)`. It calls these operations and returns the buffer with its output. A model with a module
that has no `record` is decoded by PyTorch. The tape itself is lit_gpt.generation.tape.Tape.
"""

from typing import Protocol

import torch
from torch import Tensor, nn


class RowChoice(Protocol):
    """Says which of several adapters each row of a batch goes through.

    Attributes:
        rows: int64 (B,), a number for each row, read anew at each step.
    """

    rows: Tensor


class DecodingTape(Protocol):
    """Takes the operations of one decoding step. Activations are float32 (rows, size) buffers.

    Attributes:
        dtype: the model's.
        choice: what the operations `by_row` go by.
    """

    dtype: torch.dtype
    choice: RowChoice | None

    def linear(self, layer: nn.Module, x: Tensor, name: str) -> Tensor:
        """Apply a linear layer, or what wraps one, to x, and return the buffer `name` that holds the output."""

    def norm(self, norm: nn.Module, x: Tensor, name: str | None, parts: int = 1) -> Tensor:
        """Normalize each of so many parts of x, and return the buffer `name`; without a name, x itself is changed."""

    def lora_down(self, A: Tensor, x: Tensor, by_row: bool) -> Tensor:
        """Multiply x by A (ranks, in_features), or with `by_row` by each row's of (adapters, ranks, in_features)."""

    def lora_up(self, y: Tensor, low: Tensor, first: int, B: Tensor, rows: tuple[int, int], by_row: bool) -> None:
        """Add to the columns (start, stop) of y what B makes of the ranks of `low` from `first` on.

        Args:
            B: (ranks, stop - start), transposed, in the model's dtype; with `by_row` one for each adapter.
        """

    def scale(self, y: Tensor, scale: Tensor, shift: Tensor) -> None:
        """Replace y by scale * (y + shift), both float32 (size,)."""
