"""Runs the training loop, the only one."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_gpt.checkpoints import io
from lit_gpt.errors import UserError
from lit_gpt.methods.finetuned_file import file_contents
from lit_gpt.training.args import TrainArgs
from lit_gpt.training.batches import Batch, Batches
from lit_gpt.training.checks import raised
from lit_gpt.training.records import Records
from lit_gpt.training.resume import ResumeStates
from lit_gpt.training.schedule import Schedule
from lit_gpt.training.signals import StopSignals
from lit_gpt.training.strategy import Worker
from lit_gpt.training.validation import Evaluator


@dataclass
class Trainer:
    """Takes the steps of a run, with what watches them.

    Attributes:
        record: what the finetuned file says of the run: hyperparameters, prompt style, the base's quantization.
        step: how many optimizer steps are done.
        prefetched: the next batch, made while the device still computes.
    """

    args: TrainArgs
    worker: Worker
    batches: Batches
    schedule: Schedule
    evaluator: Evaluator
    records: Records
    states: ResumeStates
    record: dict[str, Any]
    step: int = 0
    prefetched: Batch | None = None

    def fit(self) -> bool:
        """Train to the end. Return False if a signal stopped the run before that, its state saved."""
        args, records, steps, fabric = self.args.watch, self.records, self.schedule.steps, self.worker.fabric
        self.restore()
        with records.show_progress(self.step, steps), StopSignals(fabric) as signals, self.profiler() as profiler:
            if self.step == 0:
                records.write({"step": 0, "tokens": 0, **self.validate()})
                self.measure_probe()
            while not self.finished():
                loss, norm, tokens = self.train_step()
                self.step += 1
                records.record_step(self.step, loss, norm, tokens)
                if profiler:
                    profiler.step()
                last, logging = self.step == steps, self.step % args.log_interval == 0
                evaluating, saving = self.step % args.eval_interval == 0, self.step % args.save_interval == 0
                stopping = (logging or fabric.world_size == 1) and signals.asked()
                if logging or evaluating or saving or stopping or last:
                    self.log(evaluating or last)
                if saving or stopping or self.finished() or args.result == "best" and self.improved():
                    self.save()
                if stopping and not self.finished():
                    fabric.print(f"stopped after step {self.step}; the same command with --resume auto goes on")
                    return False
            if self.step < steps:
                wanted = "higher score" if args.metric else "lower loss"
                fabric.print(f"ended after step {self.step}: {args.patience} validations without a {wanted}")
            if args.result == "best":
                self.take_best()
            self.measure_probe()
        return True

    def finished(self) -> bool:
        """Return whether the last step is done, or --patience has run out."""
        judged, patience = list(self.evaluator.judged.values()), self.args.watch.patience
        since_best = len(judged) - 1 - judged.index(min(judged)) if judged else 0
        return self.step >= self.schedule.steps or patience is not None and since_best >= patience

    def improved(self) -> bool:
        """Return whether there was a validation after this step, and it is the best so far."""
        judged = self.evaluator.judged
        return self.step in judged and judged[self.step] == min(judged.values())

    def take_best(self) -> None:
        """Go back to the weights of the best validation, if others have followed."""
        if self.states.best is None or self.states.best[0] == self.step:
            return
        step, judged = self.states.best
        path = self.states.path(step)
        self.worker.method.load_state(self.worker.model, io.load(path, mmap=False)["state"], path)
        self.worker.fabric.print(f"the result is that of step {step}, which has {self.evaluator.name(judged)}")

    def train_step(self) -> tuple[Tensor, Tensor | None, int]:
        """Take one optimizer step along the gradient of the mean over the global batch.

        Returns:
            this rank's share of that mean, a float32 scalar on the device; the norm of the gradient over all ranks, if
            it is known; and the tokens fed to all ranks.
        """
        worker, batch = self.worker, self.prefetched or self.batches.batch(self.step)
        worker.set_learning_rate(self.schedule.learning_rate(self.step))
        worker.wrapped.train()
        total = self.add_gradients(batch)
        while worker.overflowed():  # in fp16 alone
            total = self.add_gradients(batch)
        norm = worker.step()
        self.prefetched = self.batches.batch(self.step + 1)  # while a GPU still computes: nothing has waited for it
        return total, norm, batch.tokens

    def add_gradients(self, batch: Batch) -> Tensor:
        """Compute the gradients of a step, and return this rank's share of the loss."""
        total = torch.zeros((), device=self.worker.fabric.device)
        for n, row in enumerate(batch.rows, 1):
            # all rows of a step start from the same random numbers, on all ranks: what is random about a sample follows
            # from them and its number, and nothing between steps, nor resuming, disturbs it
            torch.manual_seed((self.args.optimization.seed * 1_000_003 + self.step) % 2**63)
            total += self.worker.backward(row, batch.weight, more=n < len(batch.rows))
        return total

    def log(self, evaluating: bool) -> None:
        """Write a row of metrics.csv, with the validation loss if `evaluating`."""
        losses = self.records.losses()
        self.check_finite(losses)
        row = self.records.log(self.step, losses, self.schedule.learning_rate(self.step - 1))
        self.records.write(row | self.validate() if evaluating else row)

    def validate(self) -> dict[str, float]:
        """Return what validation measures after this step, and show an answer."""
        with self.records.pause_timer():
            return self.evaluator.validate(self.step)

    def measure_probe(self) -> None:
        """Record the loss on the probe, if there is one."""
        with self.records.pause_timer():
            loss = self.evaluator.probe_loss()
        if loss is not None:
            self.records.record_probe(self.step, loss)

    def check_finite(self, losses: list[tuple[int, float]]) -> None:
        """Stop at the first loss that is not a number, keeping the batch that gave it."""
        for step, loss in losses:
            if not math.isfinite(loss):
                path = self.args.paths.out_dir / f"batch_of_step_{step}.pth"
                samples = [self.batches.dataset[i] for i in self.batches.indices(step - 1)]
                io.save(path, {"step": step, "samples": [sample.tokens.clone() for sample in samples]})
                raise UserError(
                    f"the loss of step {step} is {loss}; its batch is in {path}: look at it, or lower --learning_rate"
                )

    def save(self) -> None:
        """Write the resume state of this step."""
        with self.records.pause_timer():
            contents = self.finetuned()
            resume = {"optimizer": self.worker.optimizer_state(), "progress": self.records.progress()}
            self.states.write(self.step, self.evaluator.judged.get(self.step), contents, resume)

    def finetuned(self) -> dict[str, Any]:
        """Return the contents of the finetuned file as of now. All ranks must ask together."""
        worker = self.worker
        state = worker.method.state(worker.model)
        return file_contents(worker.method.name, self.states.identity["base"], state, **self.record)

    def restore(self) -> None:
        """Continue from the newest whole state in out_dir if `--resume auto` finds one, else begin."""
        worker, paths = self.worker, self.args.paths
        newest = self.states.newest() if paths.resume == "auto" else None
        if newest is None:
            if paths.finetuned_path:
                identity = self.states.identity
                worker.method.warm_start(worker.model, paths.finetuned_path, identity["base"], identity["quantization"])
            return self.records.start()
        path, contents = newest
        resume = contents["resume"]
        worker.method.load_state(worker.model, contents["state"], path)
        worker.load_optimizer_state(resume["optimizer"])
        self.step = resume["step"]
        self.records.resume(self.step, resume["progress"])
        self.evaluator.losses, self.evaluator.scores = (self.records.measured(name) for name in ("val_loss", "score"))
        worker.fabric.print(f"resumed after step {self.step} from {path}")
        before = resume["hyperparameters"]
        if any(raised(name, value, before.get(name)) for name, value in self.states.flags.items()):
            rate, steps = self.schedule.learning_rate(self.step), self.schedule.steps
            worker.fabric.print(f"it goes on to step {steps}; the learning rate is now that of such a run, {rate:.3g}")

    def profiler(self) -> AbstractContextManager[Any]:
        """Return what traces the steps after the first one and writes a trace for Perfetto, if that is asked for."""
        steps, path = self.args.watch.profile_steps, self.args.paths.out_dir / "trace.json.gz"
        if not steps or self.worker.fabric.global_rank:
            return nullcontext()
        return torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=steps, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
        )
