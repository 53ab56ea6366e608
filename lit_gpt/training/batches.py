"""Decides which samples each optimizer step trains on, and which rows each rank makes of its share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lit_gpt.data.dataset import Samples
from lit_gpt.data.packing import RowSize, longest_row, micro_batches, step_samples
from lit_gpt.distributed.fabric import Fabric
from lit_gpt.training.args import BatchArgs
from lit_gpt.training.objectives import Objective
from lit_gpt.training.schedule import Schedule


@dataclass(frozen=True)
class Batch:
    """Holds what an optimizer step trains on, on the device or on its way there."""

    step: int
    rows: list[Any]  # this rank's
    weight: int  # all ranks' together: what the summed loss is divided by
    tokens: int  # fed to all ranks


@dataclass(frozen=True)
class Batches:
    """Makes the batches of a run, by optimizer step; the same samples for any number of ranks."""

    dataset: Samples
    objective: Objective
    args: BatchArgs
    seed: int
    schedule: Schedule
    fabric: Fabric

    @property
    def row_size(self) -> RowSize:
        """Return how many samples a row takes, or if that is None, how many tokens it holds."""
        return self.args.micro_batch_size, self.args.micro_batch_tokens

    def indices(self, step: int) -> list[int]:
        """Return the samples of a step, counted from 0, of all ranks."""
        return step_samples(len(self.dataset), self.args.batch_size, self.seed, step, self.schedule.samples)

    def batch(self, step: int) -> Batch:
        """Return what a step trains on; beyond the last step, nothing."""
        indices, dataset = self.indices(step), self.dataset
        rows = rank_rows(dataset, indices, self.row_size, self.objective, self.fabric)
        weight = self.objective.weight(dataset[i] for i in indices)
        return Batch(step, [self.row(row) for row in rows], weight, sum(dataset.lengths[i] - 1 for i in indices))

    def row(self, samples: Sequence[Any]) -> Any:
        """Return a row of samples, on the device or on its way there."""
        return self.objective.collate(samples).to(self.fabric.device)

    def longest_row(self) -> list[int]:
        """Return the samples of this rank's longest row in an epoch."""
        steps = range(min(self.schedule.steps, math.ceil(len(self.dataset) / self.args.batch_size)))
        shares = (self.indices(step)[self.fabric.global_rank :: self.fabric.world_size] for step in steps)
        return longest_row(shares, self.dataset.lengths, self.row_size)

    def shortest_row(self) -> list[int]:
        """Return the shortest sample, as a row of its own."""
        return [min(range(len(self.dataset)), key=self.dataset.lengths.__getitem__)]


def rank_rows(
    dataset: Samples, indices: list[int], size: RowSize, objective: Objective, fabric: Fabric
) -> list[list[Any]]:
    """Return the samples of each of this rank's rows.

    Every rank gets as many rows, for they compute together; where one has none left, an idle row.
    """
    shares = [
        list(micro_batches(indices[rank :: fabric.world_size], dataset.lengths, *size))
        for rank in range(fabric.world_size)
    ]
    rows = [[dataset[i] for i in part] for part in shares[fabric.global_rank]]
    missing = max(map(len, shares)) - len(rows)
    return rows + [[objective.idle(dataset)]] * missing if missing else rows
