"""The inputs of a batch besides token ids: where samples begin, and which positions are supervised."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """Says which positions of a row are supervised, and with which token."""

    positions: Tensor  # int64 (n,), into the flattened (B * T,) hidden states
    labels: Tensor  # int64 (n,)


@dataclass(frozen=True)
class Segments:
    """Says where the samples that are packed into one row begin and end. Attention never crosses a boundary."""

    lengths: tuple[int, ...]
    offsets: Tensor  # int32 (n + 1,), from 0 to the row's length
    positions: Tensor  # int64 (T,), restarting with each sample

    @classmethod
    def of(cls, lengths: list[int], device: torch.device | str = "cpu") -> "Segments":
        counts = torch.tensor([0, *lengths])
        positions = torch.cat([torch.arange(n) for n in lengths])
        offsets = counts.cumsum(0).to(torch.int32)
        return cls(tuple(lengths), offsets.to(device, non_blocking=True), positions.to(device, non_blocking=True))
