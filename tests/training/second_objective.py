"""An objective of its own in one file: every token is learned, and long samples weigh as much as short ones.

    ACTION=finetune python tests/training/second_objective.py --objective even --checkpoint_dir ... --out_dir ...

ACTION is finetune or plan, with the flags of finetune/lora.py or scripts/plan.py.
"""

import os
import runpy
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_gpt.cli import run
from lit_gpt.data.dataset import Sample
from lit_gpt.data.packing import PackedRow
from lit_gpt.methods.hyperparameters import LoRAConfig
from lit_gpt.model.packed_inputs import Targets
from lit_gpt.training import objectives
from lit_gpt.training.args import TrainArgs


class EvenSamples(objectives.SupervisedFinetuning):
    """The mean over samples of each one's mean cross-entropy over all of its tokens."""

    name = "even"

    def collate(self, samples: Sequence[Sample]) -> PackedRow:
        row = super().collate(samples)
        labels = torch.cat([s.tokens[1:] for s in samples]).long()
        return PackedRow(row.idx, row.segments, Targets(torch.arange(len(labels)), labels))

    def weight(self, samples: Iterable[Sample]) -> int:
        return sum(1 for sample in samples if len(sample.tokens) > 2)  # an idle sample has two

    def loss(self, model: nn.Module, row: PackedRow) -> Tensor:
        lengths, start, total = row.segments.lengths, 0, 0.0
        for length in lengths:
            at = torch.arange(start, start + length)
            start += length
            if length > 1:
                targets = Targets(at, row.targets.labels[at])
                total = total + model(row.idx, segments=row.segments, targets=targets) / length
            else:
                total = total + model(row.idx, segments=row.segments, targets=Targets(at[:0], at[:0]))
        return total

    def plan_row(self, lengths: Sequence[int], weight: int) -> PackedRow:
        return PackedRow.without_contents(lengths, sum(lengths))


objectives.register(EvenSamples)


def finetune(config: LoRAConfig, args: TrainArgs) -> None:
    from lit_gpt.methods.lora import LoRA
    from lit_gpt.training.setup import finetune

    finetune(args, LoRA(config))


if __name__ == "__main__":
    if os.environ["ACTION"] == "plan":
        runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "plan.py"), run_name="__main__")
    else:
        run(finetune)
