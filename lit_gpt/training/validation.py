"""Validates: measures the loss over all ranks, shows an answer, and measures the loss on a probe."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from lit_gpt.data.dataset import Samples
from lit_gpt.data.forgetting import WINDOW, Probe
from lit_gpt.data.packing import RowSize
from lit_gpt.distributed.fabric import Fabric
from lit_gpt.distributed.launch import all_reduce
from lit_gpt.generation.engine import generate
from lit_gpt.generation.steps import FastStep
from lit_gpt.model.gpt import GPT
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.training.batches import rank_rows
from lit_gpt.training.objectives import Objective, SupervisedFinetuning
from lit_gpt.training.strategy import Worker


@dataclass
class Evaluator:
    """Measures what a model has learned, and what it has forgotten.

    Attributes:
        samples: validate on so many; None: on all.
        show: shows an answer of the model.
        losses: validation losses of the run so far, by step.
    """

    worker: Worker
    dataset: Samples
    samples: int | None
    size: RowSize
    probe: Probe | None
    show: Callable[[], None]
    losses: dict[int, float] = field(default_factory=dict)

    def validate(self, step: int) -> float:
        """Return the validation loss after a step, and show an answer."""
        indices = list(range(len(self.dataset)))[: self.samples]
        self.losses[step] = self.loss(self.dataset, indices, self.size, self.worker.objective)
        self.show()
        return self.losses[step]

    def probe_loss(self) -> float | None:
        """Return the loss on the probe, if there is one."""
        if self.probe is None:
            return None
        return self.loss(self.probe, list(range(len(self.probe))), (None, WINDOW), SupervisedFinetuning())

    def loss(self, dataset: Samples, indices: list[int], size: RowSize, objective: Objective) -> float:
        """Return the mean loss over samples, over all ranks."""
        fabric, model = self.worker.fabric, self.worker.wrapped
        model.eval()
        with self.worker.autocast():
            total, weight = objective.score(model, rank_rows(dataset, indices, size, objective, fabric), fabric.device)
        sums = torch.tensor([total, weight], device=fabric.device, dtype=torch.float64)
        total, weight = all_reduce(fabric, sums)
        return (total / weight).item()


def show_answer(
    fabric: Fabric, model: GPT, tokenizer: Tokenizer, style: PromptStyle, prompt: list[int], tokens: int
) -> None:
    """Show how the model answers a prompt now. All ranks take part, for each may hold a shard of the model."""
    if not tokens or not prompt:
        return
    remaining = min(tokens, model.config.block_size - len(prompt))
    model.eval()
    step = FastStep(model) if fabric.world_size == 1 else None
    ids = list(generate(model, prompt, remaining, temperature=0, stop_ids=style.stop_ids, step=step))
    if fabric.global_rank == 0:
        tqdm.write(f"  {tokenizer.decode(prompt)[-60:]!r} -> {tokenizer.decode(ids)!r}")
