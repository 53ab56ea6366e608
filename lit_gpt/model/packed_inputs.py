"""The inputs of a batch besides token ids: where samples begin, and which positions are supervised."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from lit_gpt.kernels.flex import interval_mask


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
    samples: Tensor  # int64 (T,), the number of the sample that a token is of, by which training draws what is random
    cuts: "dict[tuple[int, int], Segments]" = field(default_factory=dict, init=False, repr=False, compare=False)
    masks: dict[int | None, BlockMask] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(
        cls, lengths: Sequence[int], device: torch.device | str = "cpu", samples: Sequence[int] | None = None
    ) -> "Segments":
        """Return the segments of samples of these lengths.

        Args:
            samples: their numbers among all that are trained on; None: their places in the row.
        """
        samples = range(len(lengths)) if samples is None else samples
        numbers = torch.cat([torch.full((n,), sample) for n, sample in zip(lengths, samples, strict=True)])
        counts = torch.tensor([0, *lengths])
        positions = torch.cat([torch.arange(n) for n in lengths])
        offsets = counts.cumsum(0).to(torch.int32)
        return cls(tuple(lengths), *(x.to(device, non_blocking=True) for x in (offsets, positions, numbers)))

    def in_groups(self, size: int, first: int) -> "Segments":
        """Return the segments with each sample cut into groups of so many tokens, of which the first has `first`.

        Only where they begin and end changes; positions go on within a sample.
        """
        if (size, first) not in self.cuts:  # all layers ask for the same
            lengths = [n for sample in self.lengths for n in group_lengths(sample, size, first)]
            offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(self.offsets.device, non_blocking=True)
            self.cuts[size, first] = replace(self, lengths=tuple(lengths), offsets=offsets)
        return self.cuts[size, first]

    def causal_mask(self, window: int | None) -> BlockMask:
        """Return the mask by which a token sees itself and those before it in its sample, or so many in all."""
        if window not in self.masks:  # all layers ask for the same
            offsets, T = self.offsets, sum(self.lengths)
            first = torch.repeat_interleave(offsets[:-1], offsets.diff(), output_size=T)
            if window is not None:
                first = first.maximum(torch.arange(1 - window, T + 1 - window, dtype=first.dtype, device=first.device))
            self.masks[window] = interval_mask(first)
        return self.masks[window]


def group_lengths(length: int, size: int, first: int) -> list[int]:
    """Return how long groups of `size` tokens are in a sample of a length, where the first has `first`."""
    ends = [*range(first, length, size), length]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
