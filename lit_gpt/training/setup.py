"""Sets up a finetuning run from its arguments, and writes its result."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt import hardware
from lit_gpt.checkpoints import io
from lit_gpt.checkpoints.base_model import BaseCheckpoint
from lit_gpt.cli import flag_values
from lit_gpt.conversion.hf import copy_side_files
from lit_gpt.data.dataset import Samples, prefixed, read_meta
from lit_gpt.data.forgetting import Probe
from lit_gpt.data.packing import RowSize
from lit_gpt.data.recipe import too_short
from lit_gpt.distributed.args import DeviceArgs
from lit_gpt.distributed.fabric import Fabric
from lit_gpt.distributed.heartbeat import peer_watchdog
from lit_gpt.distributed.launch import launch, on_main, resolve_devices, told_by_fabric_run
from lit_gpt.distributed.sharding import build_device
from lit_gpt.errors import UsageError
from lit_gpt.kernels.policy import policy, use_policy
from lit_gpt.methods.method import Method, Start
from lit_gpt.model.gpt import GPT
from lit_gpt.quantization.modules import count_parameters
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.training import checks
from lit_gpt.training.args import TrainArgs, WatchArgs
from lit_gpt.training.batches import Batches
from lit_gpt.training.loop import Trainer
from lit_gpt.training.memory.compiling import compiles_blocks
from lit_gpt.training.memory.dry_run import probe_longest_row
from lit_gpt.training.memory.plan import MemoryPlanner
from lit_gpt.training.objectives import Objective, make_objective
from lit_gpt.training.records import Records
from lit_gpt.training.resume import ResumeStates
from lit_gpt.training.schedule import Schedule
from lit_gpt.training.selfcheck.finding import Finding, print_findings, require_all
from lit_gpt.training.selfcheck.run import check_run
from lit_gpt.training.strategy import Worker
from lit_gpt.training.validation import Evaluator, Quiz, show_answer

KEPT_WELL = 0.95  # of what was trained, once it is rounded; below it is said


def finetune(args: TrainArgs, method: Method) -> None:
    """Train what `method` attaches to the model of `--checkpoint_dir`, and write `--out_dir`.

    Weights that do not train are kept in `--precision`, those that do in float32, while `--precision` is that of the
    arithmetic.

    Raises:
        UsageError: flags contradict each other.
        UserError: checkpoint, data or out_dir cannot be used, or another process of the run is lost.
    """
    checks.check_early(args, method.name, method.config)
    args = replace(args, devices=resolve_devices(told_by_fabric_run(args.devices)))
    precision = args.memory.precision
    trained = method.weight_dtype(precision) if method.trains_base else torch.float32
    frozen = hardware.DTYPES[precision]
    fabric = launch(args.devices, trained, frozen, args.optimization.max_grad_norm)
    with peer_watchdog(fabric), use_policy(**kernels(args)):
        run(args, method, fabric)


def kernels(args: TrainArgs) -> dict[str, bool | None]:
    """Return which kernels `--compile` lets serve, as a policy has them."""
    asked, here = args.memory.compile, policy()
    return {"cpp": here.cpp and asked is not False, "fused": True if asked is True else here.fused}


def check(args: TrainArgs, method: Method, base: BaseCheckpoint) -> Iterator[Finding]:
    """Yield what lit_gpt.training.selfcheck finds about a run that is not to be started.

    Raises:
        UserError: checkpoint or data cannot be used.
    """
    checks.check_quantized(args, method.trains_base, base.quantize)
    if method.virtual_tokens:
        raise UsageError(f"--method {method.name}: a run behind virtual tokens cannot be checked so far; finetune it")
    objective, meta = make_objective(args.optimization.objective), read_meta(args.paths.data_dir, base.tokenizer)
    train, validation = objective.datasets(args.paths.data_dir)
    checks.check_vocabulary(base.config, [train.tokens, validation.tokens])
    fabric = launch(DeviceArgs(), torch.float32, torch.float32)
    with use_policy(**kernels(args)):
        yield from check_run(args, method, fabric, base, objective, train, meta)


def run(args: TrainArgs, method: Method, fabric: Fabric) -> None:
    """Set a run up on this rank, train, and write the result."""
    checks.check_batch(args, fabric.world_size)
    base = BaseCheckpoint.open(args.paths.checkpoint_dir, args.memory.quantize)
    checks.check_quantized(args, method.trains_base, base.quantize)
    checks.check_sharding(args, method)
    objective = make_objective(args.optimization.objective)
    meta = read_meta(args.paths.data_dir, base.tokenizer)
    style = PromptStyle.from_dict(meta["prompt_style"])
    splits = objective.datasets(args.paths.data_dir)
    limit = checks.length_limit(args, base.config, method.virtual_tokens)
    checks.check_lengths(args, limit, *(split.lengths for split in splits))
    train, validation = (prefixed(split, method.virtual_ids(base.config)) for split in splits)
    probe = Probe(args.watch.probe_path, base.tokenizer, style, limit) if args.watch.probe_path else None
    schedule = Schedule.from_args(args.optimization, args.batch, len(train))
    if not args.optimization.max_steps and (warning := too_short(len(train), schedule.steps)):
        fabric.print(warning)
    on_cuda = fabric.device.type == "cuda"
    checks.check_offload(args, on_cuda)
    choose_products(args, fabric)
    compiled = compiles_blocks(args, base.config, base.quantize, fabric.device.type)
    checks.check_vocabulary(base.config, [split.tokens for split in (train, validation, probe) if split is not None])

    if args.watch.check:
        require_all(print_findings(check_run(args, method, fabric, base, objective, train, meta)))
    memory = hardware.device_memory(fabric.device)
    planner = MemoryPlanner(base.config, method, objective, args, base.quantize, on_cuda, memory)
    if not args.batch.micro_batch_size and not args.batch.micro_batch_tokens:
        args = replace(args, batch=replace(args.batch, micro_batch_tokens=planner.row_tokens()))
    model = build(args, method, fabric, base)
    if begins_anew(args, fabric):
        method.initialize(model, start_of(base, train, objective, fabric.device))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fabric.print(f"{method.name}: training {trainable:,} of {count_parameters(model):,} parameters")
    if probe:
        fabric.print(f"probe {args.watch.probe_path}: {probe.describe()}")
    worker = Worker(fabric, model, method, objective, args.optimization, args.memory.precision)
    flags = flag_values(method.config) | flag_values(args)
    records = Records(fabric, args.paths.out_dir, args.watch.logger, flags)
    batches = Batches(train, objective, args.batch, args.optimization.seed, schedule, fabric)
    evaluator = make_evaluator(args.watch, worker, validation, batches.row_size, probe, base.tokenizer, style)
    identity: dict[str, Any] = {"base": base.fingerprint, "data": train.fingerprint, "settings": method.settings}
    identity |= {"quantization": base.quantization, "probe": probe and probe.fingerprint}
    states = ResumeStates(fabric, args.paths.out_dir, args.watch.keep_states, flags, identity)
    record = {"hyperparameters": method.settings, "prompt_style": style.to_dict(), "quantize": base.quantization}
    trainer = Trainer(args, worker, batches, schedule, evaluator, records, states, record)
    records.memory = probe_longest_row(worker, batches, planner, compiled)
    if trainer.fit():
        write_result(trainer, base, style, trainable)


def choose_products(args: TrainArgs, fabric: Fabric) -> None:
    """Let a GPU multiply float32 in TF32, and say so."""
    if fabric.device.type == "cuda" and args.memory.precision == "fp32":
        hardware.multiply_in_tf32()
        fabric.print("--precision fp32: products are computed in TF32, with 11 bits of each factor")


def make_evaluator(
    args: WatchArgs, worker: Worker, split: Samples, size: RowSize, probe: Probe | None, tokenizer: Tokenizer,
    style: PromptStyle,
) -> Evaluator:  # fmt: skip
    """Return what validates on a split."""
    fabric, model = worker.fabric, worker.model
    show = partial(show_answer, fabric, model, tokenizer, style, worker.objective.prompt(split[0]), args.sample_tokens)
    place = fabric, model, tokenizer, style.stop_ids
    quiz = Quiz.of(args.metric, split, args.eval_samples, *place) if args.metric else None
    return Evaluator(worker, split, args.eval_samples, size, probe, show, quiz)


def build(args: TrainArgs, method: Method, fabric: Fabric, base: BaseCheckpoint) -> GPT:
    """Return the base with the method attached."""
    torch.manual_seed(args.optimization.seed % 2**63)
    # FSDP casts each rank's shard by itself: the whole stays mapped from its file
    dtype = None if args.devices.strategy == "fsdp" else method.weight_dtype(args.memory.precision)
    model = method.attach(base.build(dtype, build_device(args.devices.strategy, fabric)))
    model.noise_alpha = args.optimization.neftune_alpha
    model.attend_in_groups(args.optimization.attention_group)
    return model


def start_of(base: BaseCheckpoint, train: Samples, objective: Objective, device: torch.device) -> Start:
    """Return what a method may start from besides the base."""

    def encode(text: str) -> list[int]:
        return base.tokenizer.encode(text, bos=False).tolist()

    return Start(encode, lambda samples: objective.collate([train[i] for i in samples]).to(device), len(train))


def begins_anew(args: TrainArgs, fabric: Fabric) -> bool:
    """Return whether what trains starts from the base alone: not from a file, nor from a state that is resumed."""
    resumed = args.paths.resume == "auto" and bool(fabric.broadcast(checks.state_paths(args.paths.out_dir)))
    return not (resumed or args.paths.finetuned_path)


def write_result(trainer: Trainer, base: BaseCheckpoint, style: PromptStyle, trainable: int) -> None:
    """Write what was trained, and the run's summary."""
    worker, out_dir = trainer.worker, trainer.args.paths.out_dir
    method, contents = worker.method, trainer.finetuned()

    def write() -> None:
        if method.trains_base:
            path = write_checkpoint(out_dir, contents["state"], base, style)
        else:
            path = out_dir / f"lit_model_{method.name}_finetuned.pth"
            io.save(path, contents)
        trainer.records.finish(method.name, worker.objective.name, trainable, base.quantization)
        note = (
            trainer.states.best_step_note(trainer.step, trainer.evaluator.name)
            if trainer.args.watch.result == "last"
            else ""
        )
        print(f"wrote {path}{note}")

    on_main(worker.fabric, write)


def write_checkpoint(out_dir: Path, state: dict[str, Tensor], base: BaseCheckpoint, style: PromptStyle) -> Path:
    """Make out_dir a checkpoint folder like the base's, in its dtypes."""
    copy_side_files(base.checkpoint_dir, out_dir)
    style.save(out_dir)
    tensors: Any = ((name, state[name]) for name in base.state)
    io.write_streamed(out_dir / "lit_model.pth", base.state, tensors)
    (out_dir / "lit_config.json").write_text(base.config.to_json())
    kept = share_kept(state, base.state)
    if kept < KEPT_WELL:
        stored = str(base.dtype).removeprefix("torch.")
        print(
            f"{kept:.0%} of the weights' change is left in {stored}, in which the base is stored; a base that was "
            "converted with --dtype fp32 keeps all of it"
        )
    return out_dir


def share_kept(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> float:
    """Return how much of the change of a base's weights is left, along the change, once they have the base's dtypes."""
    left = whole = 0.0
    for name, old in base.items():
        if (new := state[name].float().cpu()).dtype != old.dtype:
            change, rounded = new - old.float(), new.to(old.dtype).float() - old.float()
            left, whole = left + (rounded * change).sum().item(), whole + change.square().sum().item()
    return left / whole if whole else 1.0
