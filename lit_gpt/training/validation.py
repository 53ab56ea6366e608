"""Validates: measures the loss over all ranks and scores answers, shows one, and measures the loss on a probe."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from lit_gpt.data.dataset import Samples, prefixed
from lit_gpt.data.forgetting import WINDOW, Probe
from lit_gpt.data.packing import RowSize
from lit_gpt.distributed.fabric import Fabric
from lit_gpt.distributed.launch import all_reduce
from lit_gpt.errors import UserError
from lit_gpt.generation.engine import likeliest_answer
from lit_gpt.generation.steps import FastStep
from lit_gpt.hardware import sum_dtype
from lit_gpt.model.gpt import GPT
from lit_gpt.text.metrics import Metric
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.text.questions import Question, question_of
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.training.batches import rank_rows
from lit_gpt.training.checks import validation_metric
from lit_gpt.training.objectives import Objective, SupervisedFinetuning
from lit_gpt.training.strategy import Worker


@dataclass
class Evaluator:
    """Measures what a model has learned, and what it has forgotten.

    Attributes:
        samples: validate on so many; None: on all.
        show: shows an answer of the model.
        quiz: scores answers, if the run is judged by a metric.
        losses: validation losses of the run so far, by step; `scores` those by the metric.
    """

    worker: Worker
    dataset: Samples
    samples: int | None
    size: RowSize
    probe: Probe | None
    show: Callable[[], None]
    quiz: "Quiz | None" = None
    losses: dict[int, float] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)

    def validate(self, step: int) -> dict[str, float]:
        """Return the validation loss after a step, and the score if there is a metric; show an answer."""
        indices = list(range(len(self.dataset)))[: self.samples]
        self.losses[step] = self.loss(self.dataset, indices, self.size, self.worker.objective)
        measured = {"val_loss": self.losses[step]}
        if self.quiz:
            self.scores[step] = measured["score"] = self.quiz.score()
        self.show()
        return measured

    @property
    def judged(self) -> dict[int, float]:
        """Return by what validations are compared, by step; the lowest is best."""
        return {step: -score for step, score in self.scores.items()} if self.quiz else self.losses

    def name(self, judged: float) -> str:
        """Return in words what a value of `judged` stands for, if it is the best."""
        if self.quiz:
            return f"the highest score by {self.quiz.name}, {-judged:.3f}"
        return f"the lowest validation loss, {judged:.3f}"

    def probe_loss(self) -> float | None:
        """Return the loss on the probe, if there is one."""
        if self.probe is None:
            return None
        probe = prefixed(self.probe, self.worker.model.virtual_tokens)
        return self.loss(probe, list(range(len(probe))), (None, WINDOW), SupervisedFinetuning())

    def loss(self, dataset: Samples, indices: list[int], size: RowSize, objective: Objective) -> float:
        """Return the mean loss over samples, over all ranks."""
        fabric, model = self.worker.fabric, self.worker.wrapped
        model.eval()
        with self.worker.autocast():
            total, weight = objective.score(model, rank_rows(dataset, indices, size, objective, fabric), fabric.device)
        sums = torch.tensor([total, weight], device=fabric.device, dtype=sum_dtype(fabric.device))
        total, weight = all_reduce(fabric, sums)
        return (total / weight).item()


@dataclass(frozen=True)
class Quiz:
    """Has the model answer validation samples, and scores the answers. All ranks take part in each answer."""

    name: str
    metric: Metric
    questions: list[Question]
    fabric: Fabric
    model: GPT
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]

    @classmethod
    def of(cls, name: str, dataset: Samples, samples: int | None, *place: Any) -> "Quiz":
        """Return the quiz of a split's first samples; `place` are the attributes from `fabric` on.

        Raises:
            UserError: a sample has no answer after a question.
        """
        questions: list[Question] = []
        tokenizer, stop_ids = place[-2:]
        for i in range(len(dataset))[:samples]:
            try:
                ids, supervised = dataset[i].tokens.tolist(), dataset[i].supervised.tolist()
                questions.append(question_of(ids, supervised, tokenizer, stop_ids))
            except (AttributeError, ValueError) as error:
                raise UserError(f"--metric {name}: validation sample {i} {error}") from None
        return cls(name, validation_metric(name), questions, *place)

    def score(self) -> float:
        """Return the mean score of the likeliest answers, from 0 to 1."""
        step = evaluation_step(self.fabric, self.model)
        return sum(self.score_of(question, step) for question in self.questions) / len(self.questions)

    def score_of(self, question: Question, step: FastStep | None) -> float:
        ids = likeliest_answer(self.model, question.ids, 2 * question.wanted_tokens, self.stop_ids, step)
        return next(iter(self.metric(question.text, question.wanted, self.tokenizer.decode(ids)).values()))


def evaluation_step(fabric: Fabric, model: GPT) -> FastStep | None:
    """Return how a model that is being trained decodes; None: step by step, as ranks that hold shards of it must."""
    model.eval()
    return FastStep(model) if fabric.world_size == 1 else None


def show_answer(
    fabric: Fabric, model: GPT, tokenizer: Tokenizer, style: PromptStyle, prompt: list[int], tokens: int
) -> None:
    """Show how the model answers a prompt now. All ranks take part, for each may hold a shard of the model."""
    if not tokens or not prompt:
        return
    ids = likeliest_answer(model, prompt, tokens, style.stop_ids, evaluation_step(fabric, model))
    if fabric.global_rank == 0:
        text = " ".join(tokenizer.decode(prompt[len(model.virtual_tokens) :]).split())
        if len(text) > 80:  # its end, from the beginning of a word
            text = "..." + text[max(text.find(" ", len(text) - 80), len(text) - 80) :]
        tqdm.write(f"  {text!r} -> {tokenizer.decode(ids)!r}")
