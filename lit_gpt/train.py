"""The training loop, the only one. A finetune script gives its hyperparameters and attaches its method; `finetune` does
the rest: data, optimizer, steps, validation, saving, resuming, records.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from tqdm import tqdm

from lit_gpt import checkpoint, compiling, data, devices, hf_files, memory
from lit_gpt.base import Base
from lit_gpt.config import Config
from lit_gpt.decoding import FastStep
from lit_gpt.errors import UsageError, UserError
from lit_gpt.generation import generate
from lit_gpt.model import GPT
from lit_gpt.optimizers import Schedule
from lit_gpt.perplexity import score_rows
from lit_gpt.plan import Plan, Row, fit, row_tokens
from lit_gpt.probe import WINDOW, Probe
from lit_gpt.prompts import PromptStyle
from lit_gpt.quantize import count_parameters
from lit_gpt.records import Records, StopSignals
from lit_gpt.states import States
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.variants import Method, file_contents, load_trained, read_file, trained_state


def finetune(hp: SimpleNamespace, method: Method) -> None:
    """Train what `method` leaves trainable in the model of `hp.checkpoint_dir`, and write `hp.out_dir`.

    Args:
        hp: the flags of finetune/lora.py. Weights that do not train are kept in `hp.precision`, those that do in
            float32, while `hp.precision` is that of the arithmetic.

    Raises:
        UsageError: flags that contradict each other.
        UserError: checkpoint, data or out_dir cannot be used, or another process of the run is lost.
    """
    if hp.out_dir.resolve() == hp.checkpoint_dir.resolve():
        raise UsageError(f"--out_dir {hp.out_dir}: is the base's own folder; choose another")
    trained = method.stored(hp) if method.whole_model else torch.float32
    fabric = devices.launch(hp, trained, frozen=checkpoint.DTYPES[hp.precision])
    with devices.company(fabric), compiling.kernels_if(hp.compile):
        train_method(hp, method, fabric)


def train_method(hp: SimpleNamespace, method: Method, fabric: Fabric) -> None:
    check_batch(hp, fabric.world_size)
    base = Base.of(hp.checkpoint_dir, hp.quantize)
    check_quantized(hp, method, base.quantize)
    method, config = replace(method, quantize=base.quantize), base.config
    tokenizer = Tokenizer(hp.checkpoint_dir)
    meta = data.read_meta(hp.data_dir, tokenizer)
    train, validation = (data.Dataset(hp.data_dir, split) for split in data.SPLITS)
    check_lengths(hp, train, validation)
    style = PromptStyle.from_dict(meta["prompt_style"])
    probe = hp.probe_path and Probe(hp.probe_path, tokenizer, style, length_limit(hp))
    schedule = Schedule.of(hp, len(train))
    records = Records(hp, fabric)
    records.check_unused()
    on_cuda, room = fabric.device.type == "cuda", memory.of_device(fabric.device)
    check_offload(hp, on_cuda)
    compiled = compiling.wanted(hp, config, base.quantize, fabric.device.type)

    if not hp.micro_batch_size and not hp.micro_batch_tokens:
        hp.micro_batch_tokens = row_tokens(config, method, hp, room if on_cuda else None)
    check_vocabulary(config, train, validation, *([probe] if probe else ()))
    model = load_to_train(hp, method, fabric, base)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fabric.print(f"{method.name}: training {trainable:,} of {count_parameters(model):,} parameters")
    wrapped, optimizer = devices.setup(fabric, model, hp)

    identity = {"base": base.fingerprint, "data": train.fingerprint, "settings": method.settings}
    identity["quantization"] = base.quantization
    identity["probe"] = probe and probe.fingerprint
    if probe:
        fabric.print(f"probe {hp.probe_path}: {probe.describe()}")
    run = Run(hp, fabric, wrapped, model, optimizer, train, validation, schedule, records, probe)
    run.states = States(hp, fabric, identity)
    record = {"hyperparameters": method.settings, "prompt_style": style.to_dict(), "quantize": base.quantization}
    run.contents = partial(file_contents, method.name, base.fingerprint, **record)
    run.arithmetic = partial(method.arithmetic, hp, fabric.device.type)
    run.plan = partial(fit, config, method, hp, cuda=on_cuda, memory=room)
    run.compiled = compiled
    run.sample = partial(print_sample, fabric, model, tokenizer, style, validation[0], hp)
    if not run.fit():
        return
    trained = trained_state(model)

    def write() -> None:
        if method.whole_model:
            result = write_checkpoint(hp, trained, base, style)
        else:
            result = hp.out_dir / f"lit_model_{method.name}_finetuned.pth"
            checkpoint.save(result, run.contents(trained))
        records.finish(method.name, trainable, base.quantization)
        print(f"wrote {result}{run.where_better()}")

    devices.on_main(fabric, write)


def load_to_train(hp: SimpleNamespace, method: Method, fabric: Fabric, base: Base) -> GPT:
    torch.manual_seed(hp.seed % 2**63)
    shared = devices.place_to_build(hp, fabric)
    # FSDP casts each rank's share by itself: the whole stays mapped from its file
    kept = None if hp.strategy == "fsdp" else method.stored(hp)
    return method.attach(base.build(kept, shared))


def write_checkpoint(hp: SimpleNamespace, state: dict[str, Tensor], base: Base, style: PromptStyle) -> Path:
    """Make out_dir a checkpoint folder like the base's, in its dtypes."""
    hf_files.copy_side_files(hp.checkpoint_dir, hp.out_dir)
    style.save(hp.out_dir)
    tensors = ((name, state[name]) for name in base.state)
    checkpoint.write_streamed(hp.out_dir / "lit_model.pth", base.state, tensors)
    (hp.out_dir / "lit_config.json").write_text(base.config.to_json())
    return hp.out_dir


def check_batch(hp: SimpleNamespace, world_size: int) -> None:
    """Refuse a batch that cannot be shared out evenly."""
    if hp.batch_size % world_size:
        raise UsageError(f"--batch_size {hp.batch_size}: expected a multiple of the {world_size} devices")
    share, micro = hp.batch_size // world_size, hp.micro_batch_size
    if micro and share % micro:
        raise UsageError(f"--micro_batch_size {micro}: expected a divisor of the {share} samples of a step per device")
    if getattr(hp, "optimizer_in_backward", False) and (world_size > 1 or micro != share):
        raise UsageError(
            "--optimizer_in_backward true: needs one device, and one packed row per step: "
            f"--micro_batch_size {hp.batch_size}"
        )


def check_quantized(hp: SimpleNamespace, method: Method, quantize: str | None) -> None:
    """Refuse what a quantized base does not go with."""
    asked = f"--quantize {quantize}" if hp.quantize else f"--checkpoint_dir {hp.checkpoint_dir} ({quantize})"
    if quantize and method.whole_model:
        raise UsageError(f"{asked}: quantized weights cannot train; finetune/lora.py trains beside them")
    if quantize and hp.strategy in ("fsdp", "deepspeed"):
        raise UsageError(f"{asked}: --strategy {hp.strategy} does not share out quantized weights; use ddp")


def check_offload(hp: SimpleNamespace, on_cuda: bool) -> None:
    if hp.activation_checkpointing == "offload" and not on_cuda:
        raise UsageError("--activation_checkpointing offload: there is no GPU to move activations away from; try full")


def check_lengths(hp: SimpleNamespace, *splits: data.Dataset) -> None:
    longest, limit = max(max(split.lengths) for split in splits), length_limit(hp)
    if longest > limit:
        raise UserError(
            f"--data_dir {hp.data_dir}: holds samples of up to {longest} tokens, more than --max_seq_length {limit}; "
            f"prepare it again with --max_seq_length {limit}"
        )


def length_limit(hp: SimpleNamespace) -> int:
    """Tokens that a sample may have."""
    block_size = Config.from_checkpoint(hp.checkpoint_dir).block_size
    return min(hp.max_seq_length or block_size, block_size)


def check_vocabulary(config: Config, *splits: data.Dataset | Probe) -> None:
    largest = max(int(split.tokens.max()) for split in splits)
    if largest >= config.padded_vocab_size:
        raise UserError(
            f"the tokenizer gives the id {largest}, but the model's embedding has {config.padded_vocab_size} rows; "
            "are both of the same checkpoint?"
        )


@dataclass(frozen=True)
class Batch:
    """What an optimizer step trains on, on the device or on its way there."""

    step: int
    rows: list[data.PackedRow]  # of this rank
    supervised: int  # tokens of all ranks, as is the next
    tokens: int


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
    probe: Probe | None
    states: States = field(init=False)
    contents: Callable[[dict[str, Tensor]], dict[str, Any]] = field(init=False)  # of the file of what was trained
    plan: Callable[[list[Row]], tuple[str, Row, Plan]] = field(init=False)  # see lit_gpt.plan.fit
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
        held = memory.restart(self.model)
        self.pretend(row)
        took = memory.peak_since_restart() - held
        planned = plan.train - plan.weights
        self.records.memory = {"step_bytes_planned": planned, "step_bytes_measured": took}
        self.fabric.print(
            f"memory: a step on the longest row, {row.idx.numel()} tokens, took {took / 1e9:.2f} GB beside the model "
            f"({planned / 1e9:.2f} GB planned)"
        )

    def set_up(self, row: data.PackedRow) -> Plan:
        """Compile the blocks if wanted, and let them keep as little of this row as memory demands; its plan."""
        kind, _, plan = self.plan([(list(row.segments.lengths), len(row.targets.labels))])
        if self.fabric.world_size > 1:  # ranks gather weights together, and so must run the same
            index = torch.tensor(memory.KINDS.index(kind), device=self.fabric.device)
            kind = memory.KINDS[int(self.fabric.all_reduce(index, reduce_op="max"))]
        if self.compiled:
            compiling.compile_blocks(self.model)
        if not (self.compiled and kind == "selective"):  # what is compiled does so by itself
            memory.spare_activations(self.model, kind)
        if kind != self.hp.activation_checkpointing and kind != "none":
            self.fabric.print(f"memory: activation checkpointing is {kind}, by the plan")
        return plan

    def packed(self, indices: list[int]) -> data.PackedRow:
        return data.pack([self.train[i] for i in indices]).to(self.fabric.device)

    def pretend(self, row: data.PackedRow) -> None:
        """Take a step on a row, and take it back."""
        devices.allocate(self.fabric, self.optimizer)
        self.wrapped.train()
        with devices.accumulating(self.fabric, self.wrapped, more=False):
            with self.arithmetic():
                loss = self.wrapped(row.idx, segments=row.segments, targets=row.targets)
            self.fabric.backward(loss * 0.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        devices.forget(self.fabric, self.optimizer)

    def longest_row(self) -> list[int]:
        """The samples of this rank's longest packed row in an epoch."""
        lengths, size = self.train.lengths, (self.hp.micro_batch_size, self.hp.micro_batch_tokens)
        longest: list[int] = []
        for step in range(min(self.schedule.steps, math.ceil(len(lengths) / self.hp.batch_size))):
            indices = data.step_samples(len(lengths), self.hp.batch_size, self.hp.seed, step, self.schedule.samples)
            share = indices[self.fabric.global_rank :: self.fabric.world_size]
            rows = [longest, *data.micro_batches(share, lengths, *size)]
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
            with devices.accumulating(fabric, self.wrapped, more=n < len(batch.rows)):
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
        indices = data.step_samples(len(train), hp.batch_size, hp.seed, step, self.schedule.samples)
        rows = [data.pack(row).to(self.fabric.device) for row in rank_rows(train, indices, hp, self.fabric)]
        supervised = data.supervised_count(train[i] for i in indices)
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
                indices = data.step_samples(len(self.train), hp.batch_size, hp.seed, step - 1, self.schedule.samples)
                checkpoint.save(path, {"step": step, "samples": [self.train[i].tokens.clone() for i in indices]})
                raise UserError(
                    f"the loss of step {step} is {loss}; its batch is in {path}: look at it, or lower --learning_rate"
                )

    def save(self) -> None:
        """Write the resume state of this step."""
        with self.records.aside():
            contents = self.contents(trained_state(self.model))
            contents["resume"] = {
                "optimizer": devices.optimizer_state(self.fabric, self.model, self.optimizer),
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
        devices.load_optimizer_state(self.fabric, self.model, self.optimizer, resume["optimizer"])
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


def rank_rows(
    dataset: data.Dataset | Probe, indices: list[int], hp: SimpleNamespace, fabric: Fabric
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


def validate(
    fabric: Fabric, model: nn.Module, dataset: data.Dataset | Probe, hp: SimpleNamespace, count: int | None = None
) -> float:
    """Mean cross-entropy in nats over all supervised tokens of the first `count` samples, over all ranks."""
    model.eval()
    indices = list(range(len(dataset)))[:count]
    score = score_rows(model, rank_rows(dataset, indices, hp, fabric), fabric.device)
    total = torch.tensor([score.nats, score.tokens], device=fabric.device, dtype=torch.float64)
    nats, tokens = fabric.all_reduce(total, reduce_op="sum")
    return (nats / tokens).item()


def print_sample(
    fabric: Fabric, model: GPT, tokenizer: Tokenizer, style: PromptStyle, sample: data.Sample, hp: SimpleNamespace
) -> None:
    """Show how the model answers a validation prompt now. All ranks take part, for each may hold a share of it."""
    if not hp.sample_tokens:
        return
    start = int(sample.supervised.nonzero()[0]) or len(sample.tokens) // 2  # without a masked prompt: half of it
    prompt = sample.tokens[:start].tolist()
    room = min(hp.sample_tokens, model.config.block_size - len(prompt))
    model.eval()
    step = FastStep(model) if fabric.world_size == 1 else None
    ids = list(generate(model, prompt, room, temperature=0, stop_ids=style.stop_ids, step=step))
    if fabric.global_rank == 0:
        tqdm.write(f"  {tokenizer.decode(prompt)[-60:]!r} -> {tokenizer.decode(ids)!r}")
