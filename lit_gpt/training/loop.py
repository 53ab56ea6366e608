"""The training loop, the only one."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from lit_gpt import hardware
from lit_gpt.checkpoints import io
from lit_gpt.data import dataset as data
from lit_gpt.data import packing
from lit_gpt.errors import UsageError, UserError
from lit_gpt.methods.finetuned_file import load_trained, read_file, trained_state
from lit_gpt.model.gpt import GPT
from lit_gpt.training import activation_checkpointing, compile, strategy
from lit_gpt.training.evaluate import rank_rows, validate
from lit_gpt.training.memory_plan import Plan, Row
from lit_gpt.training.probe import WINDOW, Probe
from lit_gpt.training.records import Records
from lit_gpt.training.resume import States
from lit_gpt.training.schedule import Schedule
from lit_gpt.training.signals import StopSignals


@dataclass(frozen=True)
class Batch:
    """What an optimizer step trains on, on the device or on its way there."""

    step: int
    rows: list[packing.PackedRow]  # of this rank
    supervised: int  # tokens of all ranks, as is the next
    tokens: int


@dataclass
class Trainer:
    """What a run holds; `fit` is the loop."""

    hp: SimpleNamespace
    fabric: Fabric
    wrapped: nn.Module  # the model behind Fabric's strategy
    model: GPT
    optimizer: torch.optim.Optimizer
    train: data.Dataset
    validation: data.Dataset
    schedule: Schedule
    records: Records
    probe: Probe | None
    states: States = field(init=False)
    contents: Callable[[dict[str, Tensor]], dict[str, Any]] = field(init=False)  # of the file of what was trained
    plan: Callable[[list[Row]], tuple[str, Row, Plan]] = field(
        init=False
    )  # see lit_gpt.training.memory_plan.choose_settings
    sample: Callable[[], None] = field(init=False)  # shows how the model answers now
    arithmetic: Callable[[], Any] = nullcontext  # the context of a forward pass
    compiled: bool = False  # whether torch.compile serves the blocks
    step: int = 0  # optimizer steps done
    upcoming: Batch | None = None
    validated: dict[int, float] = field(default_factory=dict)  # validation losses of this process, by step

    def fit(self) -> bool:
        """Train to the last step. False if a signal stopped the run before that, its state saved."""
        hp, records, steps = self.hp, self.records, self.schedule.steps
        self.rehearse()
        self.restore()
        with records.watch(self.step, steps), StopSignals(self.fabric) as signals:
            if self.step == 0:
                records.write({"step": 0, "tokens": 0, "val_loss": self.evaluate()})
                self.measure_probe()
            while self.step < steps:
                loss, tokens = self.optimize()
                self.step += 1
                records.count(self.step, loss, tokens)
                last, logging = self.step == steps, self.step % hp.log_interval == 0
                evaluating, saving = self.step % hp.eval_interval == 0, self.step % hp.save_interval == 0
                stopping = (logging or self.fabric.world_size == 1) and signals.asked()
                if logging or evaluating or saving or stopping or last:
                    self.log(evaluating or last)
                if saving or stopping or last:
                    self.save()
                if stopping and not last:
                    self.fabric.print(f"stopped after step {self.step}; the same command with --resume auto goes on")
                    return False
            self.measure_probe()
        return True

    def rehearse(self) -> None:
        """A step on the longest packed row of an epoch that changes nothing: what runs out of memory does so now.

        What it took is told beside what was planned, over the memory that the loaded model holds.
        """
        row = self.packed(self.longest_row())
        plan = self.set_up(row)
        start = time.perf_counter()
        self.pretend(self.packed([min(range(len(self.train)), key=self.train.lengths.__getitem__)]))
        if self.compiled:
            self.fabric.print(
                f"the first step, in which the blocks are compiled, took {time.perf_counter() - start:.0f} s"
            )
        held = hardware.reset_peak(self.model)
        self.pretend(row)
        took = hardware.peak_since_restart() - held
        planned = plan.train - plan.weights
        self.records.memory = {"step_bytes_planned": planned, "step_bytes_measured": took}
        self.fabric.print(
            f"memory: a step on the longest row, {row.idx.numel()} tokens, took {took / 1e9:.2f} GB beside the model "
            f"({planned / 1e9:.2f} GB planned)"
        )

    def set_up(self, row: packing.PackedRow) -> Plan:
        """Compile the blocks if wanted, and let them keep as little of this row as memory demands; its plan."""
        kind, _, plan = self.plan([(list(row.segments.lengths), len(row.targets.labels))])
        if self.fabric.world_size > 1:  # ranks gather weights together, and so must run the same
            index = torch.tensor(activation_checkpointing.KINDS.index(kind), device=self.fabric.device)
            kind = activation_checkpointing.KINDS[int(self.fabric.all_reduce(index, reduce_op="max"))]
        if self.compiled:
            compile.compile_blocks(self.model)
        if not (self.compiled and kind == "selective"):  # what is compiled does so by itself
            activation_checkpointing.apply_activation_checkpointing(self.model, kind)
        if kind != self.hp.activation_checkpointing and kind != "none":
            self.fabric.print(f"memory: activation checkpointing is {kind}, by the plan")
        return plan

    def packed(self, indices: list[int]) -> packing.PackedRow:
        return packing.pack([self.train[i] for i in indices]).to(self.fabric.device)

    def pretend(self, row: packing.PackedRow) -> None:
        """Take a step on a row, and take it back."""
        strategy.allocate(self.fabric, self.optimizer)
        self.wrapped.train()
        with strategy.maybe_no_sync(self.fabric, self.wrapped, more=False):
            with self.arithmetic():
                loss = self.wrapped(row.idx, segments=row.segments, targets=row.targets)
            self.fabric.backward(loss * 0.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        strategy.clear_optimizer_state(self.fabric, self.optimizer)

    def longest_row(self) -> list[int]:
        """The samples of this rank's longest packed row in an epoch."""
        lengths, size = self.train.lengths, (self.hp.micro_batch_size, self.hp.micro_batch_tokens)
        longest: list[int] = []
        for step in range(min(self.schedule.steps, math.ceil(len(lengths) / self.hp.batch_size))):
            indices = packing.step_samples(len(lengths), self.hp.batch_size, self.hp.seed, step, self.schedule.samples)
            share = indices[self.fabric.global_rank :: self.fabric.world_size]
            rows = [longest, *packing.micro_batches(share, lengths, *size)]
            longest = max(rows, key=lambda row: sum(lengths[i] for i in row))
        return longest or [0]

    def optimize(self) -> tuple[Tensor, int]:
        """One optimizer step: the gradient of the mean over all supervised tokens of the global batch.

        Returns:
            this rank's share of that mean, a float32 scalar on the device, and the tokens fed to all ranks.
        """
        fabric, batch = self.fabric, self.upcoming
        if batch is None or batch.step != self.step:
            batch = self.prepare(self.step)
        seed_step(self.hp.seed, self.step, fabric.global_rank)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate(self.step)
        self.wrapped.train()
        total = torch.zeros((), device=fabric.device)
        for n, row in enumerate(batch.rows, 1):
            with strategy.maybe_no_sync(fabric, self.wrapped, more=n < len(batch.rows)):
                with self.arithmetic():
                    loss = self.wrapped(row.idx, segments=row.segments, targets=row.targets) / batch.supervised
                fabric.backward(loss * fabric.world_size)  # ranks' gradients are averaged, and their sum is wanted
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.upcoming = self.prepare(self.step + 1)  # while a GPU still computes: nothing has waited for it
        return total, batch.tokens

    def prepare(self, step: int) -> Batch:
        """What step `step` trains on. Beyond the last, nothing."""
        hp, train = self.hp, self.train
        indices = packing.step_samples(len(train), hp.batch_size, hp.seed, step, self.schedule.samples)
        rows = [packing.pack(row).to(self.fabric.device) for row in rank_rows(train, indices, hp, self.fabric)]
        supervised = packing.supervised_count(train[i] for i in indices)
        return Batch(step, rows, supervised, sum(train.lengths[i] - 1 for i in indices))

    def log(self, evaluating: bool) -> None:
        losses = self.records.losses()
        self.check_finite(losses)
        row = self.records.log(self.step, losses, self.schedule.learning_rate(self.step - 1))
        self.records.write(row | {"val_loss": self.evaluate()} if evaluating else row)

    def evaluate(self) -> float:
        """The validation loss; and a sample is shown."""
        with self.records.aside():
            with self.arithmetic():
                loss = validate(self.fabric, self.wrapped, self.validation, self.hp, self.hp.eval_samples)
            self.sample()
            self.validated[self.step] = loss
            return loss

    def measure_probe(self) -> None:
        if self.probe:
            size = SimpleNamespace(micro_batch_size=None, micro_batch_tokens=WINDOW)
            with self.records.aside(), self.arithmetic():
                self.records.probe(self.step, validate(self.fabric, self.wrapped, self.probe, size))

    def check_finite(self, losses: list[tuple[int, float]]) -> None:
        """Stop at the first loss that is not a number, keeping the batch that gave it."""
        for step, loss in losses:
            if not math.isfinite(loss):
                hp, path = self.hp, self.hp.out_dir / f"batch_of_step_{step}.pth"
                indices = packing.step_samples(len(self.train), hp.batch_size, hp.seed, step - 1, self.schedule.samples)
                io.save(path, {"step": step, "samples": [self.train[i].tokens.clone() for i in indices]})
                raise UserError(
                    f"the loss of step {step} is {loss}; its batch is in {path}: look at it, or lower --learning_rate"
                )

    def save(self) -> None:
        """Write the resume state of this step."""
        with self.records.aside():
            contents = self.contents(trained_state(self.model))
            contents["resume"] = {
                "optimizer": strategy.optimizer_state(self.fabric, self.model, self.optimizer),
                "progress": self.records.progress(),
            }
            self.states.write(self.step, self.validated.get(self.step), contents)

    def restore(self) -> None:
        """Go on from the newest whole state in out_dir if `--resume auto` finds one, else begin."""
        found = self.states.newest() if self.hp.resume == "auto" else None
        if found is None:
            self.begin()
            return self.records.start()
        path, contents = found
        resume = contents["resume"]
        load_trained(self.model, contents["state"], path)
        strategy.load_optimizer_state(self.fabric, self.model, self.optimizer, resume["optimizer"])
        self.step = resume["step"]
        self.records.go_on(self.step, resume["progress"])
        self.fabric.print(f"resumed after step {self.step} from {path}")

    def begin(self) -> None:
        """Where --lora_path is given, take over what an earlier run has trained.

        Raises:
            UserError: that is of another base, or the flags say otherwise than its settings.
        """
        path, settings = getattr(self.hp, "lora_path", None), self.states.identity["settings"]
        if path is None:
            return
        record = read_file(path, "lora", self.states.identity["base"])
        for name, value in record["hyperparameters"].items():
            if name != "dropout" and settings.get(name) != value:
                raise UsageError(f"--lora_{name} {settings.get(name)}: {path} has {str(value).lower()}; give that")
        load_trained(self.model, record["state"], path)

    def where_better(self) -> str:
        """A remark, if an earlier state had a lower validation loss than the last."""
        step, loss = self.states.best or (self.step, 0.0)
        path = self.states.path(step)
        return f"; the lowest validation loss, {loss:.3f}, was that of {path}" if step != self.step else ""


def seed_step(seed: int, step: int, rank: int) -> None:
    """Random numbers depend on the step alone, so that nothing between steps disturbs them, nor resuming."""
    torch.manual_seed(((seed * 1_000_003 + step) * 1_009 + rank) % 2**63)
