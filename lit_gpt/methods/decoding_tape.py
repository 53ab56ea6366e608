"""What an attached module may add to a decoding tape, so that the fast decoding step computes it.

A module that a method attaches defines `record`: in place of a linear layer `record(tape, x, name)`, in place of a norm
`record(tape, x, name, parts)`, of an MLP `record(tape, x)`, of an embedding `record(tape, x, factor, by_position,
skipped)`. It calls these operations and returns the buffer with its output. A model with a module that has no `record`
is decoded by PyTorch. The tape itself is lit_gpt.generation.steps.tape.Tape.
"""

from typing import Protocol

import torch
from torch import Tensor, nn


class RowChoice(Protocol):
    """Says which of several adapters each row of a batch goes through.

    Attributes:
        addresses: int64 (B,), for each row where the updates of its adapter lie, one for each layer that adapters have:
            the addresses of A and B and their rank, int64 (layers, 3); 0: it has no adapter. Read anew at each step.
    """

    addresses: Tensor


class DecodingTape(Protocol):
    """Takes the operations of one decoding step. Activations are float32 (rows, size) buffers.

    Attributes:
        dtype: the model's.
        choice: what the operations on a row's own update go by.
    """

    dtype: torch.dtype
    choice: RowChoice | None

    def embed(self, x: Tensor, table: nn.Module, factor: float, by_position: bool, skipped: int = 0) -> None:
        """Set x to the rows of an embedding of the tokens, or with `by_position` add those of their positions, which
        lie behind `skipped` others, times a factor."""

    def linear(self, layer: nn.Module, x: Tensor, name: str) -> Tensor:
        """Apply a linear layer, or what wraps one, to x, and return the buffer `name` that holds the output."""

    def norm(self, norm: nn.Module, x: Tensor, name: str | None, parts: int = 1) -> Tensor:
        """Normalize each of so many parts of x, and return the buffer `name`; without a name, x itself is changed."""

    def mlp(self, mlp: nn.Module, x: Tensor) -> Tensor:
        """Apply an MLP, or what wraps one, to x, and return the buffer that holds the output."""

    def lora_down(self, A: Tensor, x: Tensor) -> Tensor:
        """Multiply x by A (ranks, in_features)."""

    def lora_up(self, y: Tensor, low: Tensor, first: int, B: Tensor, rows: tuple[int, int]) -> None:
        """Add to the columns (start, stop) of y what B makes of the ranks of `low` from `first` on.

        Args:
            B: (ranks, stop - start), transposed, in the model's dtype.
        """

    def row_lora_down(self, layer: int, x: Tensor, ranks: int) -> Tensor:
        """Multiply each row of x by the A of its own update of a layer, of so many ranks at most."""

    def row_lora_up(self, y: Tensor, low: Tensor, layer: int) -> None:
        """Add to each row of y what the B of its own update makes of `low`."""

    def scale(self, y: Tensor, scale: Tensor, shift: Tensor) -> None:
        """Replace y by scale * (y + shift), both float32 (size,)."""

    def activate(self, y: Tensor, activation: str) -> None:
        """Apply an activation by its name to y, in place."""
