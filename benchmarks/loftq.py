"""Does a start from LoftQ pay? QLoRA from plain NF4 beside QLoRA from weights that were rounded together with a LoRA.

    python benchmarks/loftq.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --data_dir data/gsm8k

Both train rank 64 on all linear layers by the same order of samples, for each seed; losses are those of validation
before the first step and after the last. Writes loftq.json and loftq.md.
"""

import tempfile
from pathlib import Path
from typing import Any

from recipe import call, provenance

from lit_gpt.cli import PositiveInt, run
from lit_gpt.files import read_json, write_json

checkpoint_dir: Path = Path("checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct")  # Quantize and finetune this.
data_dir: Path = Path("data/gsm8k")  # Learn this prepared data.
out_dir: Path = Path("benchmarks/results")  # Write to this folder.
seeds: list[str] = ["1", "2", "3"]  # Train with these seeds.
steps: PositiveInt = 60  # Take so many optimizer steps.
batch_size: PositiveInt = 4  # Take so many samples a step.

LAYERS = ["--lora_query", "--lora_key", "--lora_value", "--lora_projection", "--lora_mlp"]
RANK = ["--lora_r", "64"]


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        call(
            "scripts/quantize.py", "--checkpoint_dir", str(checkpoint_dir), "--quantize", "nf4", *RANK,
            "--out_dir", str(folder / "loftq"),
        )  # fmt: skip
        (start,) = (folder / "loftq").glob("*finetuned.pth")
        starts = {
            "NF4": ["--checkpoint_dir", str(checkpoint_dir), "--quantize", "nf4"],
            "LoftQ": ["--checkpoint_dir", str(folder / "loftq"), "--finetuned_path", str(start)],
        }
        runs = [(name, seed) for seed in seeds for name in starts]
        found = {f"{name} / {seed}": train(starts[name], seed, folder / name / seed) for name, seed in runs}
    write_json(out_dir / "loftq.json", provenance() | {"command": "python benchmarks/loftq.py", "runs": found})
    (out_dir / "loftq.md").write_text(page(found), encoding="utf-8")
    print(page(found))


def train(start: list[str], seed: str, out: Path) -> dict[str, float]:
    """Return the validation losses of a run before its first step and after its last."""
    flags = [
        "--max_steps",
        str(steps),
        "--batch_size",
        str(batch_size),
        "--learning_rate",
        "3e-4",
        "--sample_tokens",
        "0",
    ]
    flags += ["--lora_alpha", "64", "--lora_dropout", "0", "--eval_interval", "1000000", "--save_interval", "1000000"]
    places = [*start, "--data_dir", str(data_dir), "--out_dir", str(out), "--seed", seed]
    call("finetune/lora.py", *places, *RANK, *LAYERS, *flags)
    summary: dict[str, Any] = read_json(out / "summary.json")
    return {"first": summary["val_loss_first"], "last": summary["val_loss_last"]}


def page(found: dict[str, dict[str, float]]) -> str:
    made = provenance()
    where = f"{made['machine']['cores']} cores of {made['machine']['cpu']}; torch {made['torch']}; {made['date']}"
    lines = [
        "# A start from LoftQ\n",
        f"`python benchmarks/loftq.py`: {checkpoint_dir.name} in NF4, LoRA of rank 64 on all linear layers, {steps} "
        f"steps of batch {batch_size} on {data_dir.name}; {where}.\n",
        "| seed | loss before: NF4 | LoftQ | after: NF4 | LoftQ |",
        "|---:|---:|---:|---:|---:|",
    ]
    for seed in seeds:
        runs = [found[f"{name} / {seed}"] for name in ("NF4", "LoftQ")]
        lines.append(f"| {seed} | " + " | ".join(f"{run[at]:.4f}" for at in ("first", "last") for run in runs) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(main)
