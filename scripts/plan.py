"""Tell what a finetune will need, before it starts and without any weights.

    python scripts/plan.py --model falcon-7b --method lora --device cuda --memory_gb 24

Takes every flag of finetune/METHOD.py too; the samples of --data_dir, if it is there, are planned by their lengths.
The training step is run on tensors without contents, so the figures are those of this code; a GPU holds about half a
gigabyte besides, and its allocator some per cent.
"""

import json as json_format
from dataclasses import asdict, replace
from typing import Any, Literal

from lit_gpt.checkpoints.folder import check_checkpoint_dir
from lit_gpt.cli import PositiveFloat, peek, run
from lit_gpt.data.folder import read_record
from lit_gpt.errors import UsageError, UserError
from lit_gpt.methods.registry import config_class
from lit_gpt.training.args import ALIASES, PathArgs, TrainArgs

model: str | None = None  # Plan for this preset, such as falcon-7b (null: for the model of checkpoint_dir).
method: str = "lora"  # Plan for this method, by the name of its script in finetune/, whose flags are taken too.
device: Literal["auto", "cpu", "cuda"] = "auto"  # Plan for this device, which need not be here (auto: this machine's).
memory_gb: PositiveFloat | None = None  # Tell which settings fit into this much, too; in 1e9 bytes on each device.
tokens_per_second: PositiveFloat | None = None  # Tell how long the run takes at this rate, which a first run prints.
json: bool = False  # Print the figures as JSON, in bytes.

ELSEWHERE = 80 * 10**9  # bytes of a device that is not here


def main(config: Any, args: TrainArgs) -> None:
    check_flags(args)
    from lit_gpt.kernels.trials import describe
    from lit_gpt.training.memory.run_size import RunSize

    planner = make_planner(config, args)
    data = RunSize.of(planner) if args.paths.data_dir.exists() else None
    kind, (lengths, _), plan = planner.choose_settings([data.row if data else planner.worst_row()])
    if json:
        figures = {"train": plan.train, "tokens": sum(lengths), "activation_checkpointing": kind}
        whole = {"steps": data.steps, "run_tokens": data.tokens} if data else {}
        print(json_format.dumps(asdict(plan) | figures | whole, indent=2))
        return
    where = "cuda" if planner.cuda else "cpu"
    print(f"{method} on {model or args.paths.checkpoint_dir}, one of {planner.args.devices.ranks} {where} devices")
    print(f"parameters {plan.parameters:,}, of which {plan.trainable:,} train")
    if data:
        print(f"the longest packed row of {args.paths.data_dir}: {len(lengths)} samples, {sum(lengths)} tokens")
        print(f"the run: {data.steps} steps, about {data.tokens:,} tokens{duration(data.tokens)}")
    else:
        print(f"a packed row of {len(lengths)} x {lengths[0]} tokens, every token supervised")
    print(f"activation checkpointing: {kind}")
    for name, value in table(plan):
        print(f"  {name:<42}{value / 1e9:9.3f} GB")
    if device == "auto" and not memory_gb:
        verdict = "fits" if planner.fits(plan) else "does not fit"
        print(f"this machine has {planner.memory / 1e9:.1f} GB: the run {verdict}")
    if planner.memory == ELSEWHERE and not memory_gb:
        verdict = "fits" if planner.fits(plan) else "does not fit"
        print(f"--device {device} is not here and is taken to have 80 GB: the run {verdict}; --memory_gb gives another")
    if not planner.cuda and (tried := [*describe()]):
        print("\nchosen by trial on this machine:", *tried, sep="\n  ")
    if memory_gb:
        print_fitting_settings(planner.limited_to(data.longest) if data else planner, memory_gb)


def check_flags(args: TrainArgs) -> None:
    """Refuse what is missing, before torch takes its seconds."""
    folder = args.paths.checkpoint_dir
    if not model:
        check_checkpoint_dir(folder)
    elif folder != PathArgs.checkpoint_dir:
        raise UsageError(f"--model {model}: does not go with --checkpoint_dir {folder}; leave one out")
    if args.paths.data_dir != PathArgs.data_dir or args.paths.data_dir.exists():
        read_record(args.paths.data_dir)
    if model:
        check_model(model)


def check_model(name: str) -> None:
    """Refuse a name that no preset has."""
    from lit_gpt.families.registry import preset

    try:
        preset(name)
    except UserError as error:
        raise UsageError(f"--model: {error}") from None


def duration(tokens: int) -> str:
    """Return how long so many tokens take, in words, if a rate is given."""
    if not tokens_per_second:
        return ""
    minutes = tokens / tokens_per_second / 60
    return f", {minutes:.0f} minutes of training" if minutes < 120 else f", {minutes / 60:.1f} hours of training"


def make_planner(config: Any, args: TrainArgs) -> Any:
    from lit_gpt import hardware
    from lit_gpt.checkpoints.folder import quantization
    from lit_gpt.distributed.launch import resolve_devices
    from lit_gpt.families.registry import config_from_name
    from lit_gpt.methods.registry import make_method
    from lit_gpt.model.config import Config
    from lit_gpt.training.checks import check_quantized
    from lit_gpt.training.memory.plan import MemoryPlanner
    from lit_gpt.training.objectives import make_objective

    folder = args.paths.checkpoint_dir
    model_config = config_from_name(model) if model else Config.from_checkpoint(folder)
    stored = None if model else quantization(folder)
    quantize = stored["quantize"] if stored else args.memory.quantize
    finetune_method, here = make_method(method, config), hardware.default_device()
    memory = hardware.device_memory(here) if device in ("auto", here.type) else ELSEWHERE
    memory, cuda = int((memory_gb or 0) * 1e9) or memory, (here.type if device == "auto" else device) == "cuda"
    args = replace(args, devices=resolve_devices(args.devices))
    check_quantized(args, finetune_method.trains_base, quantize)
    objective = make_objective(args.optimization.objective)
    return MemoryPlanner(model_config, finetune_method, objective, args, quantize, cuda, memory)


def table(plan: Any) -> list[tuple[str, int]]:
    rows = [(name, getattr(plan, name)) for name in ("weights", "gradients", "optimizer", "activations")]
    rows += [(f"peak of {name}", getattr(plan, name)) for name in ("train", "evaluate", "save")]
    return rows + ([("peak of merge_lora (host, beside the file)", plan.merge)] if plan.merge else [])


def print_fitting_settings(planner: Any, gigabytes: float) -> None:
    """Print what rows would need, with each kind of activation checkpointing, from large ones down to one that fits."""
    print(f"\nsettings with the memory that they need, from long packed rows down to one that fits {gigabytes:g} GB")
    largest = 16384 if planner.cuda else planner.row_tokens()  # beyond, a CPU gains nothing
    sample = planner.worst_row()[0][0]  # the least that a row holds
    sizes = [n for n in (16384, 8192, 4096, 2048, 1024, 512) if sample <= n <= largest] or [sample]
    for kind in planner.kinds:
        for tokens in sizes:
            batch = replace(planner.args.batch, micro_batch_tokens=tokens, micro_batch_size=None)
            plan = planner.plan(replace(planner, args=replace(planner.args, batch=batch)).worst_row(), kind)
            verdict = "fits" if plan.peak <= gigabytes * 1e9 else "does not fit"
            flags = f"--micro_batch_tokens {tokens} --activation_checkpointing {kind}"
            print(f"  {flags:<69}{plan.peak / 1e9:9.3f} GB  {verdict}")
            if verdict == "fits":
                break


if __name__ == "__main__":
    run(main, lambda: (config_class(peek("method", method)), TrainArgs), aliases=ALIASES)
