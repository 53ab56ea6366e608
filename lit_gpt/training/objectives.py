"""Defines what a run trains for: what a prepared sample is, how samples become rows, and the loss.

The training loop knows no objective by name. Another one derives from Objective and is registered under a name.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_gpt.data.dataset import Dataset, Sample, Samples
from lit_gpt.data.folder import SPLITS
from lit_gpt.data.packing import PackedRow, pack, supervised_count
from lit_gpt.errors import UsageError
from lit_gpt.hardware import sum_dtype


class Objective(ABC):
    """Defines what a run trains for."""

    name: ClassVar[str]

    @abstractmethod
    def datasets(self, data_dir: Path) -> tuple[Samples, Samples]:
        """Open the samples to train and to validate on.

        Raises:
            UserError: the folder is not prepared for this objective.
        """

    @abstractmethod
    def collate(self, samples: Sequence[Any]) -> Any:
        """Return a row of samples on the CPU: `tokens`, how many it holds, and `to(device)`."""

    @abstractmethod
    def weight(self, samples: Iterable[Any]) -> int:
        """Return what a loss over these samples is divided by, such as their supervised tokens.

        The loss of a step is the sum over all its rows, divided by the weight of the whole global batch, however the
        batch is cut into rows and ranks.
        """

    @abstractmethod
    def idle(self, dataset: Samples) -> Any:
        """Return a short sample of no weight, for a rank that has no row left while others compute."""

    @abstractmethod
    def loss(self, model: nn.Module, row: Any) -> Tensor:
        """Return the summed loss of a row, a float32 scalar."""

    def prompt(self, sample: Any) -> list[int]:
        """Return the tokens of a sample up to an answer, to show how the model answers now; none: nothing to show."""
        return []

    @abstractmethod
    def plan_row(self, lengths: Sequence[int], weight: int) -> Any:
        """Return a row of samples of these lengths and of this weight, without contents, for the memory plan."""

    @torch.no_grad()
    def score(self, model: nn.Module, rows: Iterable[Sequence[Any]], device: torch.device) -> tuple[float, int]:
        """Return the summed loss of rows, each given as its samples, and their weight: what validation reports."""
        total, weight = torch.zeros((), dtype=sum_dtype(device), device=device), 0
        for samples in rows:
            total += self.loss(model, self.collate(samples).to(device))
            weight += self.weight(samples)
        return total.item(), weight


class SupervisedFinetuning(Objective):
    """Trains for the cross-entropy of the supervised tokens, in nats."""

    name = "sft"

    def datasets(self, data_dir: Path) -> tuple[Dataset, Dataset]:
        train, validation = (Dataset(data_dir, split) for split in SPLITS)
        return train, validation

    def collate(self, samples: Sequence[Sample]) -> PackedRow:
        return pack(samples)

    def weight(self, samples: Iterable[Sample]) -> int:
        return supervised_count(samples)

    def idle(self, dataset: Samples) -> Sample:
        tokens = dataset[0].tokens[:2]
        return Sample(tokens, torch.zeros_like(dataset[0].supervised[:2]))

    def loss(self, model: nn.Module, row: PackedRow) -> Tensor:
        return model(row.idx, segments=row.segments, targets=row.targets)

    def prompt(self, sample: Sample) -> list[int]:
        start = int(sample.supervised.nonzero()[0]) or len(sample.tokens) // 2  # without a masked prompt: half of it
        return sample.tokens[:start].tolist()

    def plan_row(self, lengths: Sequence[int], weight: int) -> PackedRow:
        return PackedRow.without_contents(lengths, weight)


OBJECTIVES: dict[str, type[Objective]] = {}


def register(objective: type[Objective]) -> None:
    """Make an objective known by its name to `--objective`."""
    OBJECTIVES[objective.name] = objective


def make_objective(name: str) -> Objective:
    """Return the objective that `--objective` names.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in OBJECTIVES:
        raise UsageError(f"--objective {name}: expected one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]()


register(SupervisedFinetuning)
