"""Refuses runs that cannot work, before anything is loaded. Nothing here imports torch, which takes seconds."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_gpt.checkpoints.folder import check_inputs, quantization
from lit_gpt.cli import flag_values
from lit_gpt.data.folder import SPLITS, read_record, sample_lengths
from lit_gpt.errors import UsageError, UserError, require
from lit_gpt.files import check_writable, read_json
from lit_gpt.methods import registry
from lit_gpt.methods.hyperparameters import refuse_other_settings, typed
from lit_gpt.model.config import Config
from lit_gpt.text.metrics import Metric, MetricArgs
from lit_gpt.training.args import OPTIMIZERS, TrainArgs
from lit_gpt.training.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from lit_gpt.methods.method import Method

LOGGERS = {  # the packages that each needs; Lightning has the loggers of the last two
    "csv": (),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb", "lightning"),
    "mlflow": ("mlflow", "lightning"),
}
# Flags that a resumed run may change: they bear on the weights that come out by no more than rounding.
FREE_TO_CHANGE = {
    "checkpoint_dir", "data_dir", "out_dir", "resume", "log_interval", "eval_interval", "eval_samples", "save_interval",
    "sample_tokens", "keep_states", "profile_steps", "activation_checkpointing", "compile", "micro_batch_size",
    "micro_batch_tokens", "devices", "num_nodes", "strategy", "zero_stage", "zero_offload", "optimizer_in_backward",
    "finetuned_path", "device", "logger", "probe_path", "quantize", "patience", "result", "check",
}  # fmt: skip


def check_early(args: TrainArgs, method: str, config: Any) -> None:
    """Refuse what flags and files tell without torch: scripts ask before they import it.

    What needs the tokenizer, the model or the devices is refused by `setup.run`.

    Args:
        method: a method's name, and `config` its hyperparameters.
    """
    paths = args.paths
    if paths.out_dir.resolve() == paths.checkpoint_dir.resolve():
        raise UsageError(f"--out_dir {paths.out_dir}: is the base's own folder; choose another")
    if args.devices.devices != "auto":
        check_batch(args, args.devices.ranks)
        if args.watch.check:
            check_one_device(args.devices.ranks)
    locate_optimizer(args.optimization.optimizer)
    for package in LOGGERS[args.watch.logger]:
        require(package, args.watch.logger, f"--logger {args.watch.logger}")
    check_start(args, method, config)
    stored = quantization(paths.checkpoint_dir) or {"quantize": args.memory.quantize}
    if args.watch.metric is not None:
        validation_metric(args.watch.metric)
    check_fp16(args, config)
    check_galore(args)
    check_quantized(args, not registry.entry(method).attaches, stored["quantize"])
    if args.optimization.attention_group and getattr(config, "virtual_tokens", 0):
        raise UsageError(
            f"--attention_group {args.optimization.attention_group}: groups after the first would not see the learned "
            "prompt; leave it out"
        )
    if args.watch.probe_path and not args.watch.probe_path.is_file():
        raise UserError(f"--probe_path {args.watch.probe_path}: no such file")
    check_out_dir(args, flag_values(config) | flag_values(args))
    read_record(paths.data_dir)
    if args.optimization.objective == "sft":  # others may read the folder in another way
        train, validation = (sample_lengths(paths.data_dir, split) for split in SPLITS)
        Schedule.from_args(args.optimization, args.batch, len(train))
        base, virtual = Config.from_checkpoint(paths.checkpoint_dir), getattr(config, "virtual_tokens", 0)
        check_lengths(args, length_limit(args, base, virtual), train, validation)


def check_start(args: TrainArgs, method: str, config: Any) -> None:
    """Refuse weights to start from that are not there, or that this method with these settings cannot go on from."""
    folder, path = args.paths.checkpoint_dir, args.paths.finetuned_path
    if not registry.entry(method).attaches and path:
        raise UsageError(
            f"--finetuned_path {path}: all weights train; give the folder to start from by --checkpoint_dir"
        )
    if (record := check_inputs(folder, path, method)) and path:
        refuse_other_settings(registry.recorded_config(record, path), config, path)


def validation_metric(name: str) -> Metric:
    """Return the metric that `--metric` names. Raises UsageError: there is no such one, or several are named."""
    if name == "regex" or "," in name:
        raise UsageError(
            f"--metric {name}: expected one of exact, contains, json, number, FILE.py:FUNCTION; eval/answers.py takes "
            "several, and regex"
        )
    return MetricArgs(name).metrics()[name]


def check_out_dir(args: TrainArgs, flags: dict[str, Any]) -> None:
    """Refuse an out_dir that is a file, that holds a run which is not to be resumed, or one that had other flags."""
    folder = args.paths.out_dir
    if folder.is_file():
        raise UserError(f"--out_dir {folder}: is a file; expected a folder, which need not exist")
    check_writable(folder)
    if args.paths.resume == "no":
        if (folder / "metrics.csv").exists():
            raise UserError(f"--out_dir {folder}: already holds a run; --resume auto continues it, or choose another")
        return
    states = state_paths(folder)
    if states and (before := read_json(folder / "hyperparameters.json", missing_ok=True)):
        refuse_changed(before, flags, states[0])


def state_paths(out_dir: Path) -> list[Path]:
    """Return the files of a run's states, the newest first."""
    return sorted((out_dir / "state").glob("step_*.pth"), reverse=True)


def refuse_changed(before: dict[str, Any], flags: dict[str, Any], path: Path) -> None:
    """Refuse to go on from a state with other flags, where they bear on the weights, but for more steps.

    Args:
        before: the flags of the run that wrote the state `path`.

    Raises:
        UserError: names all flags that differ.
    """
    now = {
        name: value
        for name, value in locked_flags(flags).items()
        if before.get(name, value) != value and not raised(name, value, before[name])
    }
    if now:
        then = typed({name: before[name] for name in now})
        raise UserError(f"{typed(now)}: the run in {path} has {then}; resume it with that or choose another --out_dir")


def raised(name: str, value: Any, before: Any) -> bool:
    """Return whether a run that may have ended is to take more steps: by more --max_steps, or more --epochs."""
    return name in ("max_steps", "epochs") and value is not None and before is not None and value > before


def locked_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the flags that a resumed run must share."""
    return {name: value for name, value in flags.items() if name not in FREE_TO_CHANGE}


def locate_optimizer(name: str) -> tuple[str, str]:
    """Return module and class of the optimizer that `--optimizer` names. Raises UsageError: there is none."""
    module, _, cls = OPTIMIZERS.get(name, name).rpartition(".")
    if not module:
        known = ", ".join(OPTIMIZERS)
        raise UsageError(f"--optimizer {name}: expected {known}, or the full name of one installed: package.Class")
    package = module.partition(".")[0]
    if find_spec(package) is None:
        raise UsageError(f"--optimizer {name}: needs {package}; `pip install {package}` brings it")
    return module, cls


def check_batch(args: TrainArgs, world_size: int) -> None:
    """Refuse a batch that cannot be shared out evenly."""
    size, micro = args.batch.batch_size, args.batch.micro_batch_size
    if size % world_size:
        raise UsageError(f"--batch_size {size}: expected a multiple of the {world_size} devices")
    share = size // world_size
    if micro and share % micro:
        raise UsageError(f"--micro_batch_size {micro}: expected a divisor of the {share} samples of a step per device")
    if not args.optimization.optimizer_in_backward:
        return
    if world_size > 1 or micro != share:
        raise UsageError(
            f"--optimizer_in_backward true: needs one device, and one packed row per step: --micro_batch_size {size}"
        )
    if args.optimization.max_grad_norm is not None:
        raise UsageError(
            f"--max_grad_norm {args.optimization.max_grad_norm}: needs all gradients at once, which "
            "--optimizer_in_backward true never holds; leave one out"
        )


def check_one_device(ranks: int) -> None:
    """Refuse to check a run of several devices."""
    if ranks > 1:
        raise UsageError("--check true: checks on one device; run scripts/check.py, then train without the flag")


def check_fp16(args: TrainArgs, config: Any) -> None:
    """Refuse what does not go with a loss that is scaled for fp16."""
    obstacles = {
        "--strategy deepspeed": args.devices.strategy == "deepspeed",
        "--optimizer_in_backward true": args.optimization.optimizer_in_backward,
        "--master_weights false": not getattr(config, "master_weights", True),
    }
    for flag, given in obstacles.items():
        if given and args.memory.precision == "fp16":
            raise UsageError(f"--precision fp16: {flag} does not go with it; leave that out, or take bf16 or fp32")


def check_quantized(args: TrainArgs, trains_base: bool, quantize: str | None) -> None:
    """Refuse what a base that is quantized to the format `quantize` does not go with."""
    by_flag = args.memory.quantize is not None
    asked = f"--quantize {quantize}" if by_flag else f"--checkpoint_dir {args.paths.checkpoint_dir} ({quantize})"
    if quantize and trains_base:
        raise UsageError(f"{asked}: quantized weights cannot train; finetune/lora.py trains beside them")
    if quantize and args.devices.strategy in ("fsdp", "deepspeed"):
        raise UsageError(f"{asked}: --strategy {args.devices.strategy} does not share out quantized weights; use ddp")


def check_sharding(args: TrainArgs, method: "Method") -> None:
    """Refuse to share out among ranks what a method wants whole."""
    if method.unsharded and args.devices.strategy in ("fsdp", "deepspeed"):
        raise UsageError(f"{method.unsharded}: --strategy {args.devices.strategy} does not share that out; use ddp")


def check_galore(args: TrainArgs) -> None:
    """Refuse to share out what GaLore decomposes."""
    if args.optimization.optimizer == "galore" and args.devices.strategy in ("fsdp", "deepspeed"):
        raise UsageError(
            f"--optimizer galore: --strategy {args.devices.strategy} holds no whole gradient to decompose; use ddp"
        )


def check_offload(args: TrainArgs, on_cuda: bool) -> None:
    """Refuse to offload where there is nothing to offload from."""
    if args.memory.activation_checkpointing == "offload" and not on_cuda:
        raise UsageError("--activation_checkpointing offload: there is no GPU to move activations away from; try full")


def check_lengths(args: TrainArgs, limit: int, *splits: list[int]) -> None:
    """Refuse data with samples of more than `limit` tokens; `splits` are their lengths."""
    longest = max(max(lengths, default=0) for lengths in splits)
    if longest > limit:
        raise UserError(
            f"--data_dir {args.paths.data_dir}: holds samples of up to {longest} tokens, more than --max_seq_length "
            f"{limit}; prepare it again with --max_seq_length {limit}"
        )


def length_limit(args: TrainArgs, config: Config, virtual_tokens: int = 0) -> int:
    """Return how many tokens a sample may have, behind so many virtual ones.

    Raises:
        UsageError: the model's context has no room for any.
    """
    room = config.block_size - virtual_tokens
    if room < 2:
        raise UsageError(f"--prompt_length {virtual_tokens}: the model's context is {config.block_size}; give fewer")
    return min(args.batch.max_seq_length or room, room)


def check_vocabulary(config: Config, token_ids: "Iterable[Tensor]") -> None:
    """Refuse data whose token ids the model's embedding does not have."""
    largest = max(int(ids.max()) for ids in token_ids)
    if largest >= config.padded_vocab_size:
        raise UserError(
            f"the tokenizer gives the id {largest}, but the model's embedding has {config.padded_vocab_size} rows; "
            "are both of the same checkpoint?"
        )
