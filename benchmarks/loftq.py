"""Does a start from LoftQ pay? QLoRA from plain NF4 beside QLoRA from weights that were rounded together with a LoRA.

    python benchmarks/loftq.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --data_dir data/gsm8k

Both train rank 64 on all linear layers by the same order of samples, for each seed; losses are those of validation
before the first step and after the last. The error of each layer's weight is computed from the files that
scripts/quantize.py wrote. Writes loftq.json after each run, and loftq.md; what is in loftq.json or work_dir is not made
again.
"""

from pathlib import Path
from statistics import mean
from typing import Any

from recipe import call

from lit_gpt.checkpoints.folder import check_inputs
from lit_gpt.cli import PositiveFloat, PositiveInt, run
from lit_gpt.files import read_json, write_json

checkpoint_dir: Path = Path("checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct")  # Quantize and finetune this.
data_dir: Path = Path("data/gsm8k")  # Learn this prepared data.
work_dir: Path = Path("out/loftq")  # Keep the quantized checkpoint and the runs in this folder.
out_dir: Path = Path("benchmarks/results")  # Write the results to this folder.
seeds: list[str] = ["1", "2", "3"]  # Train with these seeds.
steps: PositiveInt = 60  # Take so many optimizer steps.
batch_size: PositiveInt = 4  # Take so many samples a step.
learning_rate: PositiveFloat = 3e-4  # Train both at this peak learning rate.
iterations: PositiveInt = 5  # Round and approximate so often.

RANK = ["--lora_r", "64"]
LORA = "--lora_alpha 64 --lora_dropout 0 --lora_key true --lora_projection true --lora_mlp true".split()
QUIET = "--sample_tokens 0 --eval_interval 1000000 --save_interval 15".split()
STARTS = ("NF4", "LoftQ")


def main() -> None:
    check_inputs(checkpoint_dir, None)
    path, loftq = out_dir / "loftq.json", work_dir / "loftq"
    found = read_json(path, missing_ok=True) or {"layers": {}, "runs": {}}
    if not loftq.exists():
        places = ["--checkpoint_dir", str(checkpoint_dir), "--out_dir", str(loftq)]
        call("scripts/quantize.py", *places, "--quantize", "nf4", *RANK, "--lora_iterations", str(iterations))
    found["layers"] = found["layers"] or errors(loftq)
    for seed in seeds:
        for name in STARTS:
            if f"{name} / {seed}" not in found["runs"]:
                found["runs"][f"{name} / {seed}"] = train(name, seed, loftq, work_dir / name / seed)
                write_json(path, found | provenance())
    found = read_json(path)
    (out_dir / "loftq.md").write_text(page(found), encoding="utf-8")
    print(page(found))


def errors(loftq: Path) -> dict[str, dict[str, float]]:
    """Return for each layer the norm of what plain NF4 loses of its weight, and of what LoftQ's weight and LoRA do."""
    import torch

    from lit_gpt.checkpoints.base_model import load_model
    from lit_gpt.methods.finetuned_model import load_finetuned
    from lit_gpt.methods.lora import lora_layers

    weights = load_model(checkpoint_dir, torch.float32).state_dict()
    plain = load_model(checkpoint_dir, torch.float32, quantize="nf4")
    both, _ = load_finetuned(loftq, loftq / "lit_model_lora_finetuned.pth", "lora", torch.float32)
    found = {}
    for path, layer in lora_layers(both).items():
        made = {"NF4": plain.get_submodule(path).dequantize(), "LoftQ": layer.merged(torch.float32)}
        found[path] = {name: (weights[f"{path}.weight"] - weight).norm().item() for name, weight in made.items()}
    return found


def train(name: str, seed: str, loftq: Path, out: Path) -> dict[str, float]:
    """Return the validation losses of a run before its first step and after its last, and its seconds."""
    start = {
        "NF4": ["--checkpoint_dir", str(checkpoint_dir), "--quantize", "nf4"],
        "LoftQ": ["--checkpoint_dir", str(loftq), "--finetuned_path", str(loftq / "lit_model_lora_finetuned.pth")],
    }[name]
    budget = {"max_steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    flags = [word for flag, value in budget.items() for word in (f"--{flag}", str(value))]
    places = [*start, "--data_dir", str(data_dir), "--out_dir", str(out)]
    call("finetune/lora.py", *places, *RANK, *LORA, *QUIET, *flags, "--resume", "auto")
    summary: dict[str, Any] = read_json(out / "summary.json")
    return {"first": summary["val_loss_first"], "last": summary["val_loss_last"], "seconds": summary["seconds"]}


def provenance() -> dict[str, Any]:
    from peers.report import command
    from recipe import provenance

    made = provenance() | {"command": command("loftq"), "model": checkpoint_dir.name}
    return {name: value for name, value in made.items() if name != "held_out"}


def page(found: dict[str, Any]) -> str:
    from peers.report import fill

    shares = {path: error["LoftQ"] / error["NF4"] for path, error in found["layers"].items()}
    least, most = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
    machine = found["machine"]
    words = [
        f"{machine['cores']} cores of {machine['cpu']}, {machine['threads']} used; torch {found['torch']}; "
        f"{found['date']}. {found['model']} in NF4, LoRA of rank 64, alpha 64, on all linear layers; {steps} steps of "
        f"batch {batch_size} on {data_dir.name}, learning rate {learning_rate:g}, the same samples in the same order "
        f"for both; LoftQ of {iterations} turns.",
        f"The error of a weight, ||W - Q - sBA|| beside plain NF4's ||W - Q||, is lower at "
        f"{sum(share < 1 for share in shares.values())} of {len(shares)} layers: {mean(shares.values()):.0%} of it in "
        f"the mean, {shares[least]:.0%} at the best ({least}) and {shares[most]:.0%} at the worst ({most}).",
    ]
    lines = ["| seed | loss before: NF4 | LoftQ | after: NF4 | LoftQ | LoftQ's beside NF4's |", "|---:" * 6 + "|"]
    for seed in seeds:
        runs = [found["runs"][f"{name} / {seed}"] for name in STARTS]
        losses = [run[at] for at in ("first", "last") for run in runs]
        cells = [seed, *(f"{loss:.4f}" for loss in losses), f"{losses[3] - losses[2]:+.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    parts = ["# A start from LoftQ", f"`{found['command']}`", *map(fill, words), "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    run(main)
