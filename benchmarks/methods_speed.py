"""Training and decoding speed of the methods against plain LoRA, as ratios of one run.

    python benchmarks/methods_speed.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct

Each method takes optimizer steps on a packed row of as many tokens, virtual ones included, and continues the same
prompt with what it attached left apart; all take turns, round by round. The base's own decoding, which is that of a
merged model, stands beside them.
Writes methods_speed_cpu.json and .md, or with a GPU methods_speed_cuda.*.
"""

import runpy
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from methods_quality import METHODS

from lit_gpt import cli
from lit_gpt.cli import PositiveInt
from lit_gpt.files import write_json

checkpoint_dir: Path = Path("checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct")  # Attach the methods to this.
out_dir: Path = Path("benchmarks/results")  # Write the results to this folder.
samples: PositiveInt = 8  # Pack this many samples into the row.
sample_tokens: PositiveInt = 256  # Give each so many tokens.
new_tokens: PositiveInt = 64  # Generate so many after a prompt of as many.
rounds: PositiveInt = 5  # Count so many steps and answers of each; one before them does not count.

ROOT = Path(__file__).parent.parent
WITHOUT = ("NEFTune", "full", "GaLore")  # LoRA but for noise; all weights train, and a base is what comes of it
NAMES = [name for name in METHODS if name not in WITHOUT]
Work = dict[str, dict[str, Callable[[], Any]]]  # what is timed, by method


def main() -> None:
    import torch
    from peers.turns import take_turns

    from lit_gpt.checkpoints.base_model import BaseCheckpoint
    from lit_gpt.generation.engine import generate
    from lit_gpt.generation.steps import FastStep

    def answering(model: Any) -> Callable[[], Any]:
        step = FastStep(model)
        return lambda: list(generate(model.eval(), prompt, new_tokens, temperature=0, step=step))

    base = BaseCheckpoint.open(checkpoint_dir).build(torch.bfloat16)
    prompt = torch.randint(3, base.config.vocab_size, (new_tokens,)).tolist()
    work: Work = {"train": {}, "decode": {"base, or merged": answering(base)}}
    for name in NAMES:
        work["train"][name], model = training(name)
        work["decode"][name] = answering(model)
    report({what: take_turns(what, each, rounds) for what, each in work.items()}, torch)


def training(name: str) -> tuple[Callable[[], Any], Any]:
    """Return what takes an optimizer step by a method, as its finetune script would, and the model."""
    import torch

    from lit_gpt.checkpoints.base_model import BaseCheckpoint
    from lit_gpt.data.dataset import Sample, with_tokens_before
    from lit_gpt.distributed.launch import launch
    from lit_gpt.kernels.policy import use_policy
    from lit_gpt.methods.registry import config_class, make_method
    from lit_gpt.training import setup
    from lit_gpt.training.args import TrainArgs
    from lit_gpt.training.objectives import make_objective
    from lit_gpt.training.strategy import Worker

    script, *flags = METHODS[name][0].split()
    groups = (config_class(script), TrainArgs)
    values = cli.parse(runpy.run_path(str(ROOT / "finetune" / f"{script}.py")), flags, groups)
    config, args = (cli.build(group, values) for group in groups)
    method, base = make_method(script, config), BaseCheckpoint.open(checkpoint_dir, args.memory.quantize)
    fabric = launch(args.devices, torch.float32, torch.bfloat16)
    model = setup.build(args, method, fabric, base)
    objective = make_objective(args.optimization.objective)
    worker = Worker(fabric, model, method, objective, args.optimization, args.memory.precision)
    length = sample_tokens - method.virtual_tokens
    tokens = torch.randint(3, model.config.vocab_size, (samples, length), dtype=torch.int32)
    learned = [Sample(own, torch.ones(length, dtype=torch.uint8)) for own in tokens]
    drawn = [with_tokens_before(sample, model.virtual_tokens) for sample in learned]
    row, policy = objective.collate(drawn).to(fabric.device), setup.kernels(args)

    def step() -> None:
        with use_policy(**policy):
            worker.dry_run_step(row)

    return step, model


def report(found: dict[str, dict[str, list[float]]], torch: Any) -> None:
    from peers import report as peers_report

    tokens = {"train": samples * sample_tokens, "decode": new_tokens}
    lines = [
        "# Speed of the methods against plain LoRA\n",
        f"`{peers_report.command('methods_speed')}` on {peers_report.where(provenance(torch))} All linear layers of "
        f"the blocks are adapted; medians of {rounds} rounds, in which all take turns; ratios are medians of those "
        "within a round.\n",
        "| method | training, tokens/s | of plain LoRA's | decoding apart, tokens/s | of plain LoRA's |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in found["decode"]:
        cells = [name]
        for what in ("train", "decode"):
            times, plain = found[what].get(name), found[what]["LoRA"]
            ratio = median(ours / own for ours, own in zip(plain, times, strict=True)) if times else 0.0
            cells += [f"{tokens[what] / median(times):.0f}", f"{ratio:.2f}"] if times else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    out_dir.mkdir(parents=True, exist_ok=True)
    stem = out_dir / f"methods_speed_{'cuda' if torch.cuda.is_available() else 'cpu'}"
    write_json(stem.with_suffix(".json"), provenance(torch) | {"seconds": found})
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines[2:]))


def provenance(torch: Any) -> dict[str, Any]:
    from peers import report as peers_report

    return {
        "command": peers_report.command("methods_speed"), "date": date.today().isoformat(),
        "machine": peers_report.machine(torch.get_num_threads()), "versions": {"torch": torch.__version__},
    }  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
