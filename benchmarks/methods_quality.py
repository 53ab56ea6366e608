"""What each method is worth: equal budgets on three tasks that a small model learns, and the tips of its overview.

    python benchmarks/methods_quality.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct

Every method first tries learning rates on the first task (seed 0), three and then on past an end that is the best, and
keeps the one of the lowest validation loss. Then each learns each task with each seed, through the scripts that a user
runs; answers to held-out rows are scored to the letter, and the loss on a text of another kind, before and after, tells
what was forgotten. What is in methods_quality.json is not run again, so that an interrupted command goes on. Finetunes
side by side, each on one core, are the fastest way through:

    OMP_NUM_THREADS=1 python benchmarks/methods_quality.py --jobs 2 --checkpoint_dir ...
"""

import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any

import quality_page
from recipe import call, provenance
from tasks import make_rows, write_rows

from lit_gpt.checkpoints.folder import check_inputs
from lit_gpt.cli import PositiveInt, run
from lit_gpt.errors import UserError
from lit_gpt.files import read_json, write_json

checkpoint_dir: Path = Path("checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct")  # Finetune this.
out_dir: Path = Path("benchmarks/results")  # Write methods_quality.json and .md to this folder.
methods: list[str] = []  # Measure these (none: all).
seeds: list[str] = ["1", "2", "3"]  # Draw rows and start with these seeds.
rows: PositiveInt = 200  # Learn from so many rows, validation included.
held_out: PositiveInt = 40  # Score the answers to so many rows.
jobs: PositiveInt = 1  # Run so many finetunes at once.
measure_missing: bool = True  # Run what is not in methods_quality.json yet (false: write the page of what is there).

ROOT = Path(__file__).parent.parent
TASKS = ("orders", "tickets", "bookings")  # the learning rate is chosen on the first, which is the shortest
BUDGET = [
    "--batch_size", "4", "--sample_tokens", "0", "--save_interval", "1000000", "--eval_interval", "1000000",
    "--compile", "true",  # the same kernels on every machine, whichever are faster there
]  # fmt: skip
PROBE_CHARACTERS = 3000  # of the license: the text on which forgetting is measured
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
    "BitFit and norms": ("bitfit --train_norms true", 3e-3),
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
Cell = dict[str, Any]


def main() -> None:
    check_inputs(checkpoint_dir, None)
    names = methods or list(EVERY)
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(out_dir / "methods_quality.json", Path(folder))
        if measure_missing:
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(runs.choose_rate, names))
                for some in (METHODS, TIPS):
                    each = product(seeds, TASKS, filter(some.__contains__, names))
                    list(pool.map(lambda at: runs.cell(*at), each))
    if not runs.found["cells"]:
        raise UserError(f"{runs.path}: holds no run yet; leave out --measure_missing false")
    write_page(runs.found)


class Runs:
    """Runs what is not in the file of cells yet, from several threads at once, and writes it there."""

    def __init__(self, path: Path, folder: Path) -> None:
        """
        Args:
            folder: rows to learn from are put here, once for all methods.
        """
        self.path, self.folder, self.lock = path, folder, Lock()
        self.found = read_json(path, missing_ok=True) or {"cells": {}}

    def choose_rate(self, name: str) -> None:
        """Try the learning rates of the grid, and on past an end whose validation loss is the lowest."""
        rates = [EVERY[name][1] * times for times in GRID]
        losses = {rate: self.cell("0", TASKS[0], name, rate)["val_loss_last"] for rate in rates}
        while (best := min(losses, key=losses.__getitem__)) in (min(losses), max(losses)):
            rate = best * 3 if best == max(losses) else best / 3
            losses[rate] = self.cell("0", TASKS[0], name, rate)["val_loss_last"]

    def cell(self, seed: str, task: str, name: str, rate: float | None = None) -> Cell:
        """Return what a run came to; without a rate it takes the one that was chosen."""
        key = f"{name} / {task} / {seed}" + (f" / {rate:.2g}" if rate else "")
        cells = self.found["cells"]
        if key not in cells:
            with self.lock:
                rate = rate or quality_page.Cells(cells, TASKS).best(name)["learning_rate"]
                data = prepared(task, seed, self.folder)
            with tempfile.TemporaryDirectory() as own:
                cell = measure(name, data, seed, rate, Path(own))
            with self.lock:
                made = provenance() | {"command": command()}
                cells[key] = cell | {"machine": quality_page.machine(made)}
                self.found |= made
                write_json(self.path, self.found)
            print(f"{len(cells)}: {key}: {line_of(cell)}", flush=True)
        return cells[key]


def command() -> str:
    threads = os.environ.get("OMP_NUM_THREADS")
    return f"{f'OMP_NUM_THREADS={threads} ' if threads else ''}python benchmarks/methods_quality.py --jobs {jobs}"


def write_page(found: dict[str, Any]) -> None:
    words = (
        f"`{found['command']}`: {found['model']} learns {', '.join(TASKS)} from {rows} rows each, one epoch of batch "
        f"4, at the learning rate of the grid below whose validation loss on {TASKS[0]} was the lowest."
    )
    cells = quality_page.Cells(found["cells"], TASKS)
    text = quality_page.page(cells, list(METHODS), list(TIPS), words, held_out, found["date"])
    (out_dir / "methods_quality.md").write_text(text, encoding="utf-8")
    quality_page.draw(cells, list(METHODS), out_dir / "methods_quality")


def line_of(cell: Cell) -> str:
    return f"{cell['exact']:.0%} exact, validation loss {cell['val_loss_last']:.3f}, {cell['seconds']:.0f} s"


def measure(name: str, data: Path, seed: str, rate: float, folder: Path) -> Cell:
    """Return what one finetune comes to: answers, losses, what trained, the file, seconds and memory."""
    base = ["--checkpoint_dir", str(checkpoint_dir)]
    script, *flags = EVERY[name][0].split()
    places = [*base, "--data_dir", str(data / "prepared"), "--out_dir", str(folder)]
    rest = ["--learning_rate", str(rate), "--seed", seed, "--probe_path", str(data / "probe.jsonl")]
    call(f"finetune/{script}.py", *places, *BUDGET, *flags, *rest)
    summary = read_json(folder / "summary.json")
    file = folder / f"lit_model_{script}_finetuned.pth"
    answered = [*base, "--finetuned_path", str(file)] if file.is_file() else ["--checkpoint_dir", str(folder)]
    where = ["--data_path", str(data / "test.jsonl"), "--out", str(folder / "misses.jsonl")]
    scores = json.loads(call("eval/answers.py", *answered, *where, "--compare", "false", "--json", "true"))
    taken = (
        "steps", "tokens", "seconds", "trainable_parameters", "val_loss_first", "val_loss_last", "probe_loss_first",
        "probe_loss_last", "step_bytes_planned", "step_bytes_measured",
    )  # fmt: skip
    size = (file if file.is_file() else folder / "lit_model.pth").stat().st_size
    found = {"exact": next(iter(scores["exact"].values())), "learning_rate": rate, "file_bytes": size}
    return found | {field: summary[field] for field in taken}


def prepared(task: str, seed: str, folder: Path) -> Path:
    """Return a folder of prepared rows, those held out, and the text on which forgetting is measured."""
    data = folder / f"{task}_{seed}"
    if data.is_dir():
        return data
    data.mkdir()
    if task == "bookings":
        call(
            "data/make_bookings.py", "--out_dir", str(data), "--seed", seed, "--train_rows", str(rows),
            "--test_rows", str(held_out),
        )  # fmt: skip
        for part in ("train", "test"):
            (data / f"bookings_{part}.jsonl").rename(data / f"{part}.jsonl")
    else:
        drawn = make_rows(task, rows + held_out, int(seed))
        write_rows(data / "test.jsonl", drawn[:held_out])
        write_rows(data / "train.jsonl", drawn[held_out:])
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    write_rows(data / "probe.jsonl", [{"text": text[:PROBE_CHARACTERS]}])
    base = ["--checkpoint_dir", str(checkpoint_dir)]
    places = ["--data_path", str(data / "train.jsonl"), "--out_dir", str(data / "prepared")]
    call("scripts/prepare_json.py", *base, *places)
    return data


if __name__ == "__main__":
    run(main)
