"""What each method is worth: equal budgets on three tasks that a small model learns, and the tips of its overview.

    python benchmarks/methods_quality.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct

Every method first tries three learning rates on the first task (seed 0) and keeps the one of the lowest validation
loss. Then each learns each task with each seed, through the scripts that a user runs; answers to held-out rows are
scored to the letter, and the loss on a text of another kind, before and after, tells what was forgotten. What is in
methods_quality.json is not run again, so that an interrupted command goes on; the page and its pictures are written
anew after each.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import quality_page
from recipe import call, provenance
from tasks import make_rows, write_rows

from lit_gpt.checkpoints.folder import check_inputs
from lit_gpt.cli import PositiveInt, run
from lit_gpt.files import read_json, write_json

checkpoint_dir: Path = Path("checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct")  # Finetune this.
out_dir: Path = Path("benchmarks/results")  # Write methods_quality.json and .md to this folder.
methods: list[str] = []  # Measure these (none: all).
seeds: list[str] = ["1", "2", "3"]  # Draw rows and start with these seeds.
rows: PositiveInt = 200  # Learn from so many rows, validation included.
held_out: PositiveInt = 40  # Score the answers to so many rows.
measure_missing: bool = True  # Run what is not in methods_quality.json yet (false: write the page of what is there).

ROOT = Path(__file__).parent.parent
TASKS = ("orders", "tickets", "bookings")  # the learning rate is chosen on the first, which is the shortest
BUDGET = ["--batch_size", "4", "--sample_tokens", "0", "--save_interval", "1000000", "--eval_interval", "1000000"]
GRID = (1 / 3, 1, 3)  # times the learning rate that a method begins with
ALL = "lora --lora_key true --lora_projection true --lora_mlp true --lora_dropout 0"
METHODS = {  # the script with its flags, and the learning rate in the middle of the grid
    "LoRA": (ALL, 1e-3),
    "rsLoRA": (f"{ALL} --lora_scaling sqrt_r", 1e-3),
    "LoRA+": (f"{ALL} --lora_lr_ratio 16", 2e-4),
    "LoRA-FA": (f"{ALL} --lora_train B", 3e-3),
    "DoRA": (f"{ALL} --lora_update dora", 1e-3),
    "PiSSA": (f"{ALL} --lora_init pissa --lora_alpha 8", 3e-4),
    "OLoRA": (f"{ALL} --lora_init olora --lora_alpha 8", 3e-4),
    "VeRA": (f"{ALL} --lora_update vera --lora_r 128 --lora_alpha 128", 1e-2),
    "Tied-LoRA": (f"{ALL} --lora_update tied", 3e-3),
    "MultiLoRA": (f"{ALL} --lora_update multi", 3e-3),
    "GLoRA": (f"{ALL} --lora_update glora", 1e-3),
    "QLoRA": (f"{ALL} --quantize nf4", 1e-3),
    "QA-LoRA": (f"{ALL} --lora_update qa --quantize int4", 1e-3),
    "NEFTune": (f"{ALL} --neftune_alpha 5", 1e-3),
    "IA3": ("ia3", 1e-2),
    "Adapter": ("adapter", 1e-2),
    "Adapter v2": ("adapter_v2", 3e-3),
    "bottleneck": ("bottleneck", 1e-3),
    "prompt tuning": ("prompt", 1e-2),
    "P-tuning": ("prompt --prompt_encoder mlp", 1e-3),
    "prefix tuning": ("prompt --prompt_kind keys_values", 1e-2),
    "BitFit": ("bitfit", 3e-3),
    "full": ("full", 1e-4),
    "GaLore": ("full --optimizer galore", 1e-3),
}
TIPS = {  # each beside LoRA above, which has rank 8, alpha 16, all layers, AdamW, a cosine and one epoch
    "LoRA, queries and values alone": ("lora --lora_dropout 0", 1e-3),
    "LoRA, alpha half the rank": (f"{ALL} --lora_alpha 4", 1e-3),
    "LoRA, alpha the rank": (f"{ALL} --lora_alpha 8", 1e-3),
    "LoRA, alpha four times the rank": (f"{ALL} --lora_alpha 32", 1e-3),
    "LoRA, rank 2": (f"{ALL} --lora_r 2 --lora_alpha 4", 1e-3),
    "LoRA, rank 32": (f"{ALL} --lora_r 32 --lora_alpha 64", 1e-3),
    "LoRA, constant rate": (f"{ALL} --schedule constant", 1e-3),
    "LoRA, SGD": (f'{ALL} --optimizer sgd --optimizer_args {{"momentum":0.9}}', 1e-1),
    "LoRA, three epochs": (f"{ALL} --epochs 3", 1e-3),
}
EVERY = METHODS | TIPS


def main() -> None:
    check_inputs(checkpoint_dir, None)
    path = out_dir / "methods_quality.json"
    found = read_json(path, missing_ok=True) or {"rates": {}, "cells": {}}
    names = methods or list(EVERY)
    todo = [(name, TASKS[0], "0", EVERY[name][1] * times) for name in names for times in GRID]
    todo += [(name, task, seed, None) for seed in seeds for task in TASKS for name in names]
    for number, (name, task, seed, rate) in enumerate(todo if measure_missing else (), 1):
        key = f"{name} / {task} / {seed}" + (f" / {rate:.2g}" if rate else "")
        if key not in found["cells"]:
            with tempfile.TemporaryDirectory() as folder:
                cell = measure(name, task, seed, rate or chosen(found["cells"], name), Path(folder))
            found["cells"][key] = cell
            found |= provenance() | {"command": "python benchmarks/methods_quality.py"}
            write_json(path, found)
            write_page(found)
        print(f"{number} of {len(todo)}: {key}: {line_of(found['cells'][key])}", flush=True)
    write_page(found)


def write_page(found: dict[str, Any]) -> None:
    words = (
        f"`{found['command']}`: {found['model']} learns {', '.join(TASKS)} from {rows} rows each, one epoch of batch "
        f"4; out of three learning rates, the one of the lowest validation loss on {TASKS[0]} is taken."
    )
    cells = quality_page.Cells(found["cells"], TASKS)
    made = quality_page.page(cells, list(METHODS), list(TIPS), words, held_out, quality_page.where(found))
    (out_dir / "methods_quality.md").write_text(made, encoding="utf-8")
    quality_page.draw(cells, list(METHODS), out_dir / "methods_quality")


def line_of(cell: dict[str, Any]) -> str:
    return f"{cell['exact']:.0%} exact, validation loss {cell['val_loss_last']:.3f}, {cell['seconds']:.0f} s"


def chosen(cells: dict[str, dict[str, Any]], name: str) -> float:
    """Return the learning rate of the grid whose validation loss was lowest."""
    return min(quality_page.Cells(cells, TASKS).tried(name), key=lambda cell: cell["val_loss_last"])["learning_rate"]


def measure(name: str, task: str, seed: str, rate: float, folder: Path) -> dict[str, Any]:
    """Return what one finetune comes to: answers, losses, what trained, the file, seconds and memory."""
    prepare_rows(task, int(seed), folder)
    base = ["--checkpoint_dir", str(checkpoint_dir)]
    call(
        "scripts/prepare_json.py", *base, "--data_path", str(folder / "train.jsonl"), "--out_dir", str(folder / "data")
    )
    script, *flags = EVERY[name][0].split()
    places = [*base, "--data_dir", str(folder / "data"), "--out_dir", str(folder / "out")]
    rest = ["--learning_rate", str(rate), "--seed", seed, "--probe_path", str(folder / "probe.jsonl")]
    call(f"finetune/{script}.py", *places, *BUDGET, *flags, *rest)
    summary = read_json(folder / "out" / "summary.json")
    file = folder / "out" / f"lit_model_{script}_finetuned.pth"
    answered = [*base, "--finetuned_path", str(file)] if file.is_file() else ["--checkpoint_dir", str(folder / "out")]
    where = ["--data_path", str(folder / "test.jsonl"), "--out", str(folder / "misses.jsonl")]
    scores = json.loads(call("eval/answers.py", *answered, *where, "--compare", "false", "--json", "true"))
    taken = (
        "steps", "tokens", "seconds", "trainable_parameters", "val_loss_first", "val_loss_last", "probe_loss_first",
        "probe_loss_last", "step_bytes_planned", "step_bytes_measured",
    )  # fmt: skip
    size = (file if file.is_file() else folder / "out" / "lit_model.pth").stat().st_size
    found = {"exact": next(iter(scores["exact"].values())), "learning_rate": rate, "file_bytes": size}
    return found | {field: summary[field] for field in taken}


def prepare_rows(task: str, seed: int, folder: Path) -> None:
    """Write the rows to learn from, those held out, and the text on which forgetting is measured."""
    if task == "bookings":
        call(
            "data/make_bookings.py", "--out_dir", str(folder), "--seed", str(seed), "--train_rows", str(rows),
            "--test_rows", str(held_out),
        )  # fmt: skip
        for part in ("train", "test"):
            (folder / f"bookings_{part}.jsonl").rename(folder / f"{part}.jsonl")
    else:
        drawn = make_rows(task, rows + held_out, seed)
        write_rows(folder / "test.jsonl", drawn[:held_out])
        write_rows(folder / "train.jsonl", drawn[held_out:])
    write_rows(folder / "probe.jsonl", [{"text": (ROOT / "LICENSE").read_text(encoding="utf-8")}])


if __name__ == "__main__":
    run(main)
