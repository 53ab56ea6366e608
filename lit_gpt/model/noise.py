"""What is random in training: dropout, and noise on the embeddings.

It goes by the sample and the position that a token has in it, so that a sample gets the same beside any neighbors, in
any cut of a batch into rows and on any rank.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from lit_gpt.kernels.dropout import ALL_KEPT, draw, random_bits


class Dropping(Protocol):
    """Says what a layer has that drops inputs in training.

    Attributes:
        keys: of the tokens in the row that is trained on, int64 (tokens,). None before the first.
    """

    keys: Tensor | None


class Noise:
    """Hands out the keys of the row that a model trains on; see lit_gpt.kernels.dropout for what they are.

    They are kept until the next row, for activation checkpointing to run blocks again.

    Attributes:
        layers: those that want keys.
        keys: int64 (layers + 1, tokens): those of the noise on embeddings, and those of each layer.
    """

    def __init__(self) -> None:
        self.layers: list[Dropping] = []
        self.keys: Tensor | None = None

    def begin(self, samples: Tensor, positions: Tensor) -> None:
        """Make the keys of a row.

        They follow from the state of torch's generator for the CPU: where it is the same, a sample has the same keys.

        Args:
            samples: which sample each token is of, int64 (tokens,).
            positions: which place it has in that, int64 (tokens,).
        """
        tokens = draw(draw(new_seed(), samples), positions)
        self.hand_out(draw(tokens, torch.arange(len(self.layers) + 1, device=tokens.device).unsqueeze(1)))

    def hand_out(self, keys: Tensor | None) -> None:
        # to layers, for torch.compile would make a kernel for each number that a layer had to find its own by
        self.keys = keys
        for number, layer in enumerate(self.layers, 1):
            layer.keys = None if keys is None else keys[number]

    @contextmanager
    def over(self, tokens: Tensor) -> Iterator[None]:
        """Let the row be these of its tokens, int64 (n,), while the block runs."""
        whole = self.keys
        self.hand_out(None if whole is None else whole[:, tokens])
        try:
            yield
        finally:
            self.hand_out(whole)


def row_keys(keys: Tensor | None, rows: int, device: torch.device) -> Tensor:
    """Return a layer's keys if they are as many as its rows, int64 (rows,).

    Else the rows are no tokens of a row, but such as an adapter's prompt, and get keys by their places.
    """
    if keys is None or len(keys) != rows:
        return draw(new_seed(), torch.arange(rows, device=device))
    return keys


def new_seed() -> Tensor:
    """Return an int64 scalar on the CPU, which operations on any device take."""
    return torch.randint(2**63 - 1, (), device="cpu")


def with_noise(x: Tensor, lengths: Sequence[int], alpha: float, keys: Tensor) -> Tensor:
    """Return x plus U(-1, 1) * alpha / sqrt(L d) (Jain et al. 2023, NEFTune, arXiv 2310.05914).

    L is the length of the sample, as in the paper, not that of the row that it is packed into.

    Args:
        x: embeddings (B, T, d).
        lengths: of the samples in the row, whose sum is T; or of the rows, if that is T.
        keys: of the tokens, int64 (B * T,).
    """
    bounds = [alpha / math.sqrt(length * x.size(-1)) for length in lengths for _ in range(length)]
    noise = (random_bits(keys, x.size(-1)) + 0.5).mul_(2 / ALL_KEPT).sub_(1).view_as(x)
    return x + noise.to(x.dtype) * torch.tensor(bounds, dtype=x.dtype, device=x.device).unsqueeze(-1)
