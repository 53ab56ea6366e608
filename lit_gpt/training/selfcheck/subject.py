"""What is checked: a run's own base, data and method, with a few of its samples, in float32 where memory allows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lit_gpt import hardware
from lit_gpt.checkpoints.base_model import BaseCheckpoint
from lit_gpt.data.dataset import Sample, Samples
from lit_gpt.data.packing import PackedRow, epoch_order
from lit_gpt.distributed.fabric import Fabric
from lit_gpt.errors import UsageError
from lit_gpt.generation.engine import decode
from lit_gpt.generation.sampling import Sampling
from lit_gpt.generation.sequence import DecodingRow
from lit_gpt.generation.steps import FastStep
from lit_gpt.methods.finetuned_file import read_file
from lit_gpt.methods.method import Method
from lit_gpt.model.gpt import GPT
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.training.args import TrainArgs
from lit_gpt.training.objectives import Objective
from lit_gpt.training.strategy import Worker

SAMPLES, LONGEST = 4, 128  # so many samples, of at most so many tokens: a minute on a CPU
# Standard deviation of what is added to what trains, since much of it starts at zero and passes no gradient on.
NUDGE = 0.02
# How far what should be equal may be off, relative to its norm. In 16 bits rounding hides all but large faults.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}


@dataclass
class Subject:
    """Holds what the checks look at.

    Attributes:
        samples: a few of those that train, long ones cut.
        meta: the contents of the data folder's data.json.
        model: the base with the method attached; what is attached has been nudged away from its start.
        base_logits, start_logits: of `idx`, from the base, and with what is attached as it starts or was trained.
        start: what trains, as it was before it was nudged.
        step: the fast decoding step, recorded before the nudge.
    """

    base: BaseCheckpoint
    style: PromptStyle
    meta: dict[str, Any]
    objective: Objective
    samples: list[Any]
    finetuned: bool
    method: Method
    worker: Worker
    base_logits: Tensor
    start_logits: Tensor
    start: dict[str, Tensor]
    step: FastStep
    tolerance: float

    @property
    def model(self) -> GPT:
        return self.worker.model

    @property
    def idx(self) -> Tensor:
        """Return the tokens of the longest sample, int64 (1, T)."""
        return self.row(max(self.samples, key=lambda sample: len(tokens_of(self.objective, sample))))

    def row(self, sample: Any) -> Tensor:
        return tokens_of(self.objective, sample).unsqueeze(0).to(self.worker.fabric.device)


def tokens_of(objective: Objective, sample: Any) -> Tensor:
    """Return the ids that a sample feeds to the model alone, int64 (T,)."""
    return objective.collate([sample]).idx[0]


def open_subject(
    args: TrainArgs, method: Method, fabric: Fabric, base: BaseCheckpoint, objective: Objective, train: Samples,
    meta: dict[str, Any],
) -> Subject:  # fmt: skip
    """Build the model that a run would train, in float32 or if that does not fit in the run's precision.

    Args:
        meta: the contents of the data folder's data.json.
    """
    precision, device = affordable(args, base, fabric), fabric.device
    samples = choose(train, args.optimization.seed)
    if not isinstance(objective.collate(samples), PackedRow):
        raise UsageError(f"--objective {objective.name}: only rows of samples alone can be checked so far; use sft")
    model = base.build(hardware.DTYPES[precision], device).eval()
    longest = max((tokens_of(objective, sample) for sample in samples), key=len).unsqueeze(0).to(device)
    with torch.no_grad():
        base_logits = model(longest)
    torch.manual_seed(args.optimization.seed % 2**63)
    model = method.attach(model).eval()
    if path := args.paths.finetuned_path:
        method.load_state(model, read_file(path, method.name, base.fingerprint)["state"], path)
    else:
        method.initialize(model)
    step, prompt = FastStep(model), longest[0, :4].tolist()
    with torch.no_grad():
        start_logits = model(longest)
        decode_logits(model, prompt, 2, step)
    optimization = replace(args.optimization, optimizer_in_backward=False)
    worker = Worker(fabric, model, method, objective, optimization, precision)
    start = {name: tensor.clone() for name, tensor in method.state(model).items()}
    if not method.trains_base:
        nudge(model)
    style, tolerance = PromptStyle.from_dict(meta["prompt_style"]), TOLERANCE[hardware.DTYPES[precision]]
    return Subject(
        base, style, meta, objective, samples, bool(path), method, worker, base_logits,
        start_logits, start, step, tolerance,
    )  # fmt: skip


def affordable(args: TrainArgs, base: BaseCheckpoint, fabric: Fabric) -> str:
    """Return the precision to check in: fp32 if weights and gradients of that fit into half of the device's memory."""
    elements = sum(tensor.numel() for tensor in base.state.values())
    fits = 8 * elements < hardware.device_memory(fabric.device)
    return "fp32" if fits else args.memory.precision


def choose(train: Samples, seed: int) -> list[Any]:
    """Return samples of different lengths from the first that the run trains on, long ones cut."""
    first = sorted(epoch_order(len(train), seed, 0)[:64], key=train.lengths.__getitem__)
    places = [round(i * (len(first) - 1) / (SAMPLES - 1)) for i in range(SAMPLES)]
    return [cut(train[first[place]]) for place in places]


def cut(sample: Any) -> Any:
    """Return a sample of at most LONGEST tokens, around where its first answer begins."""
    if not isinstance(sample, Sample) or len(sample.tokens) <= LONGEST:
        return sample
    start = max(0, int(sample.supervised[1:].nonzero()[0]) - LONGEST // 2)
    span = slice(start, start + LONGEST)
    return Sample(sample.tokens[span], sample.supervised[span], sample.number)


@torch.no_grad()
def nudge(model: GPT) -> None:
    """Move all that trains a little, so that every part of it passes gradients on."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise, alpha=NUDGE)


def decode_logits(model: GPT, prompt: Sequence[int], n: int, step: FastStep) -> tuple[list[int], list[Tensor]]:
    """Return a prompt continued by n tokens with a cache, and the logits (padded_vocab_size,) each was drawn from."""
    logits: list[Tensor] = []

    def keep(x: Tensor, token: int) -> None:
        logits.append(x.flatten().clone())

    row = DecodingRow(list(prompt), n, sampling=Sampling(temperature=0), observe=keep)
    for _ in decode(model, [row], model.kv_cache(1, len(prompt) + n), step=step):
        pass
    return row.ids, logits
