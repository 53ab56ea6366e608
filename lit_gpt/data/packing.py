"""Packs samples into rows without padding, and decides which samples an optimizer step takes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lit_gpt.data.dataset import Sample
from lit_gpt.model.packed_inputs import Segments, Targets

RowSize = tuple[int | None, int | None]  # samples of a row; where that is None, tokens that it holds at most


@dataclass(frozen=True)
class PackedRow:
    """Samples one after another in a row, without padding. Each predicts its own next tokens."""

    idx: Tensor  # int64 (1, T)
    segments: Segments
    targets: Targets

    @classmethod
    def without_contents(cls, lengths: Sequence[int], supervised: int) -> "PackedRow":
        """Return a row of samples of these lengths with so many supervised tokens, true in its shapes only."""
        n = sum(lengths)
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        idx, positions, numbers = (torch.zeros(n, dtype=torch.int64) for _ in range(3))
        targets = Targets(*(torch.zeros(supervised, dtype=torch.int64) for _ in range(2)))
        return cls(idx.unsqueeze(0), Segments(tuple(lengths), offsets, positions, numbers), targets)

    @property
    def tokens(self) -> int:
        """Return how many tokens the row feeds to the model."""
        return self.idx.numel()

    def to(self, device: torch.device) -> "PackedRow":
        """Return the row on a device, or on its way there."""
        if device.type == "cpu":
            return self
        s, t = self.segments, self.targets
        idx, offsets, positions, numbers, at, labels = (
            (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
            for x in (self.idx, s.offsets, s.positions, s.samples, t.positions, t.labels)
        )
        return PackedRow(idx, Segments(s.lengths, offsets, positions, numbers), Targets(at, labels))


def pack(samples: Iterable[Sample]) -> PackedRow:
    """Return one row of all samples. The last token of each is predicted but predicts nothing, so it is not fed."""
    samples = list(samples)
    idx = torch.cat([s.tokens[:-1] for s in samples]).long()
    labels = torch.cat([s.tokens[1:] for s in samples]).long()
    at = torch.cat([s.supervised[1:] for s in samples]).nonzero().squeeze(1)
    numbers = [place if s.number is None else s.number for place, s in enumerate(samples)]
    segments = Segments.of([len(s.tokens) - 1 for s in samples], samples=numbers)
    return PackedRow(idx.unsqueeze(0), segments, Targets(at, labels[at]))


def supervised_count(samples: Iterable[Sample]) -> int:
    """Return how many tokens a loss over these samples is the mean of."""
    return sum(int(s.supervised[1:].sum()) for s in samples)


@lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """Return the order of n samples in an epoch; the same for any number of devices."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(n, generator=generator).tolist()


def step_samples(n: int, batch_size: int, seed: int, step: int, total: int) -> list[int]:
    """Return which of n samples optimizer step `step` (from 0) takes; epochs follow without a gap, up to `total`."""
    positions = range(step * batch_size, min((step + 1) * batch_size, total))
    return [epoch_order(n, seed, p // n)[p % n] for p in positions]


def longest_row(shares: Iterable[list[int]], lengths: Sequence[int], size: RowSize) -> list[int]:
    """Return the samples of the longest packed row that any of these shares of a step makes, or the first sample."""
    rows = (row for share in shares for row in micro_batches(share, lengths, *size))
    return max(rows, key=lambda row: sum(lengths[i] for i in row), default=[0])


def micro_batches(
    indices: list[int], lengths: Sequence[int], samples: int | None, tokens: int | None
) -> Iterator[list[int]]:
    """Split one step's samples into packed rows: of so many samples, or if that is None of up to so many tokens."""
    row: list[int] = []
    for i in indices:
        full = len(row) == samples if samples else row and sum(lengths[j] for j in row) + lengths[i] > (tokens or 0)
        if full:
            yield row
            row = []
        row.append(i)
    if row:
        yield row
