"""The training loop, the only one. A finetune script gives its hyperparameters and attaches its method; `finetune` does
the rest: data, optimizer, steps, validation, saving, resuming, records.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

from lit_gpt import checkpoint, data, devices, hf_files, variants
from lit_gpt.config import Config
from lit_gpt.errors import UsageError, UserError
from lit_gpt.generation import generate
from lit_gpt.model import GPT
from lit_gpt.prompts import PromptStyle
from lit_gpt.records import Records, StopSignals
from lit_gpt.tokenizer import Tokenizer

# Flags that a resumed run may change: they bear on the weights that come out by no more than rounding, or, through the
# cut into rows, by which inputs dropout strikes.
FREE_TO_CHANGE = {
    "checkpoint_dir", "data_dir", "out_dir", "resume", "log_interval", "eval_interval", "eval_samples", "save_interval",
    "sample_tokens", "keep", "activation_checkpointing", "micro_batch_size", "micro_batch_tokens", "devices",
    "num_nodes", "strategy",
}  # fmt: skip


def finetune(
    hp: SimpleNamespace,
    method: str,
    attach: Callable[[GPT], GPT],
    settings: dict[str, Any],
    whole_model: bool = False,
) -> None:
    """Train what `attach` leaves trainable in the model of `hp.checkpoint_dir`, and write `hp.out_dir`.

    Args:
        hp: the flags of finetune/lora.py.
        method: names the file that is written.
        attach: from the loaded base to the model to train.
        settings: the method's own hyperparameters, kept in the file, from which it can be attached again.
        whole_model: the base's weights train. They are kept in float32, while `hp.precision` is that of the
            arithmetic, and the result is a checkpoint folder.

    Raises:
        UsageError: flags that contradict each other.
        UserError: checkpoint, data or out_dir cannot be used.
    """
    if hp.out_dir.resolve() == hp.checkpoint_dir.resolve():
        raise UsageError(f"--out_dir {hp.out_dir}: is the base's own folder; choose another")
    fabric = devices.launch(hp)
    check_batch(hp, fabric.world_size)
    checkpoint.check_checkpoint_dir(hp.checkpoint_dir)
    tokenizer = Tokenizer(hp.checkpoint_dir)
    meta = data.read_meta(hp.data_dir, tokenizer)
    train, validation = (data.Dataset(hp.data_dir, split) for split in data.SPLITS)
    check_lengths(hp, train, validation)
    schedule = Schedule.of(hp, len(train))
    records = Records(hp, fabric)
    records.check_unused()

    base = checkpoint.load_state(hp.checkpoint_dir)
    config, dtype = Config.from_checkpoint(hp.checkpoint_dir), checkpoint.DTYPES[hp.precision]
    stored = torch.float32 if whole_model else dtype
    identity = {"base": checkpoint.fingerprint(base), "data": train.fingerprint, "settings": settings}
    check_vocabulary(config, train, validation)
    torch.manual_seed(hp.seed % 2**63)
    model = attach(checkpoint.build(config, base, stored, devices.place_to_build(hp, fabric), hp.checkpoint_dir))
    if hp.activation_checkpointing:
        recompute_blocks(model)
    trainable = sum(tensor.numel() for tensor in variants.trained_state(model).values())
    fabric.print(f"{method}: training {trainable:,} of {sum(p.numel() for p in model.parameters()):,} parameters")

    wrapped = fabric.setup_module(model)
    optimizer = fabric.setup_optimizers(make_optimizer(model, hp))
    run = Run(hp, fabric, wrapped, model, optimizer, train, validation, schedule, records, identity)
    run.arithmetic = partial(torch.autocast, fabric.device.type, dtype, enabled=stored != dtype)
    style = PromptStyle.from_dict(meta["prompt_style"])
    run.sample = partial(print_sample, model, tokenizer, style, validation[0], hp, fabric.global_rank == 0)
    run.restore()
    finished, trained = run.fit(), variants.trained_state(model)
    if finished and fabric.global_rank == 0:
        if whole_model:
            result = hp.out_dir
            write_checkpoint(hp, trained, config, base, style)
        else:
            result = hp.out_dir / f"lit_model_{method}_finetuned.pth"
            record = {"hyperparameters": settings, "prompt_style": style.to_dict()}
            variants.save_file(result, method, identity["base"], trained, **record)
        records.finish(method, trainable)
        print(f"wrote {result}")


def write_checkpoint(
    hp: SimpleNamespace, state: dict[str, Tensor], config: Config, base: dict[str, Tensor], style: PromptStyle
) -> None:
    """Make out_dir a checkpoint folder like the base's, in its dtypes."""
    hf_files.copy_side_files(hp.checkpoint_dir, hp.out_dir)
    style.save(hp.out_dir)
    checkpoint.save(
        hp.out_dir / "lit_model.pth", {name: state[name].to(tensor.dtype).cpu() for name, tensor in base.items()}
    )
    (hp.out_dir / "lit_config.json").write_text(config.to_json())


def check_batch(hp: SimpleNamespace, world_size: int) -> None:
    """Refuse a batch that cannot be shared out evenly."""
    if hp.batch_size % world_size:
        raise UsageError(f"--batch_size {hp.batch_size}: expected a multiple of the {world_size} devices")
    share, micro = hp.batch_size // world_size, hp.micro_batch_size
    if micro and share % micro:
        raise UsageError(f"--micro_batch_size {micro}: expected a divisor of the {share} samples of a step per device")


def check_lengths(hp: SimpleNamespace, *splits: data.Dataset) -> None:
    longest = max(max(split.lengths) for split in splits)
    block_size = Config.from_checkpoint(hp.checkpoint_dir).block_size
    limit = min(hp.max_seq_length or block_size, block_size)
    if longest > limit:
        raise UserError(
            f"--data_dir {hp.data_dir}: holds samples of up to {longest} tokens, more than --max_seq_length {limit}; "
            f"prepare it again with --max_seq_length {limit}"
        )


def check_vocabulary(config: Config, *splits: data.Dataset) -> None:
    largest = max(int(split.tokens.max()) for split in splits)
    if largest >= config.padded_vocab_size:
        raise UserError(
            f"the tokenizer gives the id {largest}, but the model's embedding has {config.padded_vocab_size} rows; "
            "are both of the same checkpoint?"
        )


@dataclass(frozen=True)
class Schedule:
    """How many steps, and the learning rate of each: linear warmup, then half a cosine down to zero."""

    steps: int
    samples: int
    warmup: int
    peak: float

    @classmethod
    def of(cls, hp: SimpleNamespace, n: int) -> "Schedule":
        samples = hp.max_steps * hp.batch_size if hp.max_steps else hp.epochs * n
        steps = math.ceil(samples / hp.batch_size)
        if hp.warmup_steps >= steps:
            raise UsageError(
                f"--warmup_steps {hp.warmup_steps}: expected fewer than the run's {steps} steps, such as {steps // 10}"
            )
        return cls(steps, samples, hp.warmup_steps, hp.learning_rate)

    def learning_rate(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        return self.peak * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup)))


def make_optimizer(model: nn.Module, hp: SimpleNamespace) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if hp.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=hp.learning_rate, weight_decay=hp.weight_decay)
    return torch.optim.AdamW(parameters, lr=hp.learning_rate, weight_decay=hp.weight_decay, fused=True)


def recompute_blocks(model: GPT) -> None:
    """Activation checkpointing: each block keeps its input alone and runs again in the backward pass."""
    for block in model.h:
        block.forward = partial(recompute, block.forward, use_reentrant=False)


@dataclass
class Run:
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
    identity: dict[str, Any]  # of what it trains on: base, data, the method's settings
    step: int = 0  # optimizer steps done
    sample: Callable[[], None] | None = None
    arithmetic: Callable[[], Any] = nullcontext  # the context of a forward pass

    def fit(self) -> bool:
        """Train to the last step. False if a signal stopped the run before that, its state saved."""
        hp, records, steps = self.hp, self.records, self.schedule.steps
        self.rehearse()
        if self.step == 0:
            records.write({"step": 0, "tokens": 0, "val_loss": self.evaluate()})
        with records.watch(self.step, steps), StopSignals(self.fabric) as signals:
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
        return True

    def rehearse(self) -> None:
        """Forward and backward on the longest packed row of an epoch: what runs out of memory does so before step 1."""
        lengths, size = self.train.lengths, (self.hp.micro_batch_size, self.hp.micro_batch_tokens)
        longest: list[int] = []
        for step in range(min(self.schedule.steps, math.ceil(len(lengths) / self.hp.batch_size))):
            indices = data.step_samples(len(lengths), self.hp.batch_size, self.hp.seed, step, self.schedule.samples)
            share = indices[self.fabric.global_rank :: self.fabric.world_size]
            rows = [longest, *data.micro_batches(share, lengths, *size)]
            longest = max(rows, key=lambda row: sum(lengths[i] for i in row))
        row = data.pack([self.train[i] for i in longest or [0]]).to(self.fabric.device)
        self.wrapped.train()
        with self.arithmetic():
            loss = self.wrapped(row.idx, segments=row.segments, targets=row.targets)
        self.fabric.backward(loss)
        self.optimizer.zero_grad()

    def optimize(self) -> tuple[Tensor, int]:
        """One optimizer step: the gradient of the mean over all supervised tokens of the global batch.

        Returns:
            this rank's share of that mean, a float32 scalar on the device, and the tokens fed to all ranks.
        """
        hp, fabric = self.hp, self.fabric
        indices = data.step_samples(len(self.train), hp.batch_size, hp.seed, self.step, self.schedule.samples)
        supervised = data.supervised_count(self.train[i] for i in indices)
        rows = rank_rows(self.train, indices, hp, fabric)
        seed_step(hp.seed, self.step, fabric.global_rank)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate(self.step)
        self.wrapped.train()
        total = torch.zeros((), device=fabric.device)
        for n, row in enumerate(rows, 1):
            row = data.pack(row).to(fabric.device)
            with fabric.no_backward_sync(self.wrapped, enabled=n < len(rows)):
                with self.arithmetic():
                    loss = self.wrapped(row.idx, segments=row.segments, targets=row.targets) / supervised
                fabric.backward(loss * fabric.world_size)  # ranks' gradients are averaged, and their sum is wanted
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, sum(self.train.lengths[i] - 1 for i in indices)

    def log(self, evaluating: bool) -> None:
        losses = self.records.losses()
        self.check_finite(losses)
        row = self.records.log(self.step, losses, self.schedule.learning_rate(self.step - 1))
        self.records.write(row | {"val_loss": self.evaluate()} if evaluating else row)

    def evaluate(self) -> float:
        """The validation loss; and a sample is shown."""
        with self.records.aside():
            with self.arithmetic():
                loss = validate(self.fabric, self.wrapped, self.validation, self.hp)
            if self.sample:
                self.sample()
            return loss

    def check_finite(self, losses: list[tuple[int, float]]) -> None:
        """Stop at the first loss that is not a number, keeping the batch that gave it."""
        for step, loss in losses:
            if not math.isfinite(loss):
                hp, path = self.hp, self.hp.out_dir / f"batch_of_step_{step}.pth"
                indices = data.step_samples(len(self.train), hp.batch_size, hp.seed, step - 1, self.schedule.samples)
                checkpoint.save(path, {"step": step, "samples": [self.train[i].tokens.clone() for i in indices]})
                raise UserError(
                    f"the loss of step {step} is {loss}; its batch is in {path}: look at it, or lower --learning_rate"
                )

    def save(self) -> None:
        """Write the resume state of this step; older ones go, but for the last `keep`."""
        with self.records.aside():
            contents = {
                "format_version": checkpoint.FORMAT_VERSION,
                "step": self.step,
                "hyperparameters": fixed(self.hp),
                "identity": self.identity,
                "trained": variants.trained_state(self.model),
                "optimizer": devices.optimizer_state(self.optimizer),
                "progress": self.records.progress(),
            }
            if self.fabric.global_rank == 0:
                checkpoint.save(self.hp.out_dir / "state" / f"step_{self.step:08d}.pth", contents)
                for old in [path for path in state_paths(self.hp) if path.stem <= f"step_{self.step:08d}"][
                    self.hp.keep :
                ]:
                    old.unlink()
            self.fabric.barrier()

    def restore(self) -> None:
        """Go on from the newest whole state in out_dir if `--resume auto` finds one, else begin.

        Raises:
            UserError: the state is of a run with other hyperparameters, base or data.
        """
        paths = self.fabric.broadcast(state_paths(self.hp)) if self.hp.resume == "auto" else []
        for path in paths:
            try:
                state = checkpoint.load(path, mmap=False)
            except UserError as error:
                self.fabric.print(f"{error}; trying the state before it")
                continue
            refuse_other_run(path, state, self.hp, self.identity)
            variants.load_trained(self.model, state["trained"], path)
            devices.load_optimizer_state(self.optimizer, state["optimizer"])
            self.step = state["step"]
            self.records.go_on(self.step, state["progress"])
            self.fabric.print(f"resumed after step {self.step} from {path}")
            return
        if paths:
            raise UserError(f"{self.hp.out_dir / 'state'}: none of its states is readable; choose another --out_dir")
        self.records.start()


def state_paths(hp: SimpleNamespace) -> list[Path]:
    """Resume states in out_dir, the newest first."""
    return sorted((hp.out_dir / "state").glob("step_*.pth"), reverse=True)


def fixed(hp: SimpleNamespace) -> dict[str, Any]:
    return {name: value for name, value in vars(hp).items() if name not in FREE_TO_CHANGE}


def refuse_other_run(path: Path, state: dict, hp: SimpleNamespace, identity: dict) -> None:
    if state["format_version"] != checkpoint.FORMAT_VERSION:
        raise UserError(f"{path}: format version {state['format_version']}, expected {checkpoint.FORMAT_VERSION}")
    for name, value in fixed(hp).items():
        before = state["hyperparameters"].get(name)
        if before != value:
            raise UserError(
                f"--{name} {value}: the run in {path} has {before}; resume it with that or choose another --out_dir"
            )
    for name, value in identity.items():
        if state["identity"].get(name) != value:
            raise UserError(f"{path}: that run has another {name}; choose another --out_dir")


def seed_step(seed: int, step: int, rank: int) -> None:
    """Random numbers depend on the step alone, so that nothing between steps disturbs them, nor resuming."""
    torch.manual_seed(((seed * 1_000_003 + step) * 1_009 + rank) % 2**63)


def rank_rows(
    dataset: data.Dataset, indices: list[int], hp: SimpleNamespace, fabric: Fabric
) -> list[list[data.Sample]]:
    """The samples of each of this rank's packed rows.

    Every rank gets as many rows, for they compute together; where one has none left, a row that teaches nothing.
    """
    size = hp.micro_batch_size, hp.micro_batch_tokens
    shares = [
        list(data.micro_batches(indices[rank :: fabric.world_size], dataset.lengths, *size))
        for rank in range(fabric.world_size)
    ]
    rows = [[dataset[i] for i in part] for part in shares[fabric.global_rank]]
    idle = data.Sample(dataset[0].tokens[:2], torch.zeros_like(dataset[0].supervised[:2]))
    return rows + [[idle]] * (max(map(len, shares)) - len(rows))


@torch.no_grad()
def validate(fabric: Fabric, model: nn.Module, dataset: data.Dataset, hp: SimpleNamespace) -> float:
    """Mean cross-entropy in nats over all supervised tokens of the first `eval_samples` samples, over all ranks."""
    model.eval()
    indices = list(range(len(dataset)))[: hp.eval_samples]
    total = torch.zeros(2, device=fabric.device, dtype=torch.float64)  # loss, tokens
    for samples in rank_rows(dataset, indices, hp, fabric):
        row = data.pack(samples).to(fabric.device)
        total[0] += model(row.idx, segments=row.segments, targets=row.targets)
        total[1] += len(row.targets.labels)
    total = fabric.all_reduce(total, reduce_op="sum")
    return (total[0] / total[1]).item()


def print_sample(
    model: GPT, tokenizer: Tokenizer, style: PromptStyle, sample: data.Sample, hp: SimpleNamespace, main: bool
) -> None:
    """Show how the model answers a validation prompt now. All ranks take part, for each may hold a share of it."""
    if not hp.sample_tokens:
        return
    start = int(sample.supervised.nonzero()[0]) or len(sample.tokens) // 2  # without a masked prompt: half of it
    prompt = sample.tokens[:start].tolist()
    room = min(hp.sample_tokens, model.config.block_size - len(prompt))
    model.eval()
    ids = list(generate(model, prompt, room, temperature=0, stop_ids=style.stop_ids))
    if main:
        tqdm.write(f"  {tokenizer.decode(prompt)[-60:]!r} -> {tokenizer.decode(ids)!r}")
