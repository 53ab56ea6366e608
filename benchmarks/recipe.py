"""What a beginner gets: tasks with checkable answers, learned from few rows or many, scored on rows held out.

    python benchmarks/recipe.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct
    python benchmarks/recipe.py --checkpoint_dir ... --rows 200 --settings printed --seeds 1 2 3

Each cell of the table runs the commands that a user runs: scripts/prepare_json.py, the finetune that it prints as the
next one (the setting "printed") or another, and eval/answers.py. A cell that is in recipe.json is not run again, so
that an interrupted command goes on; recipe.md is written anew after each.
"""

import json
import shlex
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from statistics import mean
from textwrap import fill
from typing import Any

from quality_page import where
from tasks import TASKS, make_rows, write_rows

from lit_gpt.checkpoints.folder import check_inputs
from lit_gpt.cli import PositiveInt, run
from lit_gpt.errors import UsageError, UserError
from lit_gpt.files import read_json, write_json

checkpoint_dir: Path = Path("checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct")  # Finetune this.
out_dir: Path = Path("benchmarks/results")  # Write recipe.json and recipe.md to this folder.
tasks: list[str] = []  # Take these tasks (none: all).
rows: list[str] = []  # Learn from so many rows (none: 50 200 1000 5000).
settings: list[str] = []  # Learn in these ways (none: all).
seeds: list[str] = []  # Draw rows and start with these seeds (none: 1 2 3).
held_out: PositiveInt = 40  # Score the answers to so many rows.

ROOT = Path(__file__).parent.parent
ROWS = ("50", "200", "1000", "5000")
SMALL, LAYERS = "--batch_size 4 --epochs 2", "--lora_key true --lora_projection true --lora_mlp true"
SETTINGS = {  # the script and flags of each way; None: what the prepare script prints
    "printed": None,
    "lora defaults": "lora",
    "lora, batch 4, 2 epochs": f"lora {SMALL}",
    "lora, all layers, 1e-3": f"lora {SMALL} --learning_rate 1e-3 {LAYERS}",
    "adapter v2": f"adapter_v2 {SMALL}",
    "ia3": f"ia3 {SMALL}",
    "full, 1e-4": f"full {SMALL} --learning_rate 1e-4",
}
Cell = tuple[str, str, str, str]  # task, rows, setting, seed


def main() -> None:
    check_inputs(checkpoint_dir, None)
    cells = [
        (task, n, setting, seed)
        for n in chosen("rows", rows, ROWS)
        for setting in chosen("settings", settings, tuple(SETTINGS), only=True)
        for seed in chosen("seeds", seeds, ("1", "2", "3"))
        for task in chosen("tasks", tasks, tuple(TASKS), only=True)
    ]
    path = out_dir / "recipe.json"
    found = read_json(path, missing_ok=True) or {"cells": {}}
    for number, cell in enumerate(cells, 1):
        key = " / ".join(cell)
        if key not in found["cells"]:
            with tempfile.TemporaryDirectory() as folder:
                found["cells"][key] = measure(*cell, Path(folder))
            found |= provenance()
            write_json(path, found)
            (out_dir / "recipe.md").write_text(table(found["cells"], where(found)), encoding="utf-8")
        print(f"{number} of {len(cells)}: {key}: {found['cells'][key]['exact']:.1%} exact", flush=True)


def chosen(flag: str, given: list[str], known: tuple[str, ...], only: bool = False) -> list[str]:
    """Return what a flag asks for, or all that there is; `only`: it must be known."""
    for word in given:
        if only and word not in known or not only and not word.isdecimal():
            raise UsageError(f"--{flag} {word}: expected {'some of ' + ', '.join(known) if only else 'whole numbers'}")
    return given or list(known)


def measure(task: str, n: str, setting: str, seed: str, folder: Path) -> dict[str, Any]:
    """Run one cell: what share of the held-out rows is answered exactly, and what the finetune took."""
    drawn = make_rows(task, int(n) + held_out, int(seed))
    for name, part in (("test", drawn[:held_out]), ("train", drawn[held_out:])):
        write_rows(folder / f"{name}.jsonl", part)
    base = ["--checkpoint_dir", str(checkpoint_dir)]
    data = ["--data_path", str(folder / "train.jsonl"), "--out_dir", str(folder / "data")]
    said = call("scripts/prepare_json.py", *base, *data)
    script, flags = finetune_command(setting, said, [*base, "--data_dir", str(folder / "data")])
    extra = ["--out_dir", str(folder / "out"), "--seed", seed, "--sample_tokens", "0", "--save_interval", "1000000"]
    call(script, *flags, *extra)
    summary = read_json(folder / "out" / "summary.json")
    where = ["--data_path", str(folder / "test.jsonl"), "--out", str(folder / "misses.jsonl")]
    if summary["method"] == "full":
        where += ["--checkpoint_dir", str(folder / "out")]
    else:
        where += [*base, "--finetuned_path", str(folder / "out" / f"lit_model_{summary['method']}_finetuned.pth")]
    scores = json.loads(call("eval/answers.py", *where, "--compare", "false", "--json", "true"))
    taken = {name: summary[name] for name in ("steps", "tokens", "seconds", "trainable_parameters", "val_loss_last")}
    return {"exact": next(iter(scores["exact"].values())), **taken, "flags": shlex.join(flags[4:])}


def finetune_command(setting: str, said: str, places: list[str]) -> tuple[str, list[str]]:
    """Return the finetune script of a setting with its flags, which begin with the places of checkpoint and data."""
    if SETTINGS[setting] is None:
        _, script, *flags = shlex.split(said.rpartition("next: ")[2].splitlines()[0])
        at = flags.index("--out_dir")  # measure has its own
        return script, flags[:at] + flags[at + 2 :]
    method, *flags = shlex.split(SETTINGS[setting])
    return f"finetune/{method}.py", [*places, *flags]


def call(script: str, *arguments: str) -> str:
    """Run a script and return what it prints. Raises UserError: it fails."""
    result = subprocess.run([sys.executable, ROOT / script, *arguments], capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        raise UserError(f"{script}: {result.stderr.strip().splitlines()[-1]}")
    return result.stdout


def provenance() -> dict[str, Any]:
    """Return with what the table was made."""
    import torch
    from peers.report import machine

    made = {"command": "python benchmarks/recipe.py", "model": checkpoint_dir.name, "date": str(date.today())}
    return made | {"machine": machine(torch.get_num_threads()), "torch": torch.__version__, "held_out": held_out}


def table(cells: dict[str, dict[str, Any]], made: str) -> str:
    """Return the page: for each number of rows and setting the exact answers to each task, over the seeds.

    Args:
        made: on what machine, with what and when.
    """
    drawn: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for key, cell in cells.items():
        task, n, setting, _ = key.split(" / ")
        drawn.setdefault((n, setting), {}).setdefault(task, []).append(cell)
    order = sorted(drawn, key=lambda at: (int(at[0]), list(SETTINGS).index(at[1])))
    words = (
        f"`python benchmarks/recipe.py`: {checkpoint_dir.name} learns tasks of `benchmarks/tasks.py`; of {held_out} "
        "rows held out, the share that is answered exactly: the mean over the seeds, and the least of them. The "
        'setting "printed" is the command that the prepare scripts print; seconds are those of training, on a machine '
        f"that others used meanwhile. {made}"
    )
    lines = [
        "# Defaults that teach",
        fill(words, 120, break_on_hyphens=False),
        "\n".join([f"| rows | setting | {' | '.join(TASKS)} | steps | seconds, the most |", "|---:|---|" + "---:|" * 5]
                  + [line(n, setting, drawn[n, setting]) for n, setting in order]),
    ]  # fmt: skip
    return "\n\n".join(lines) + "\n"


def line(n: str, setting: str, by_task: dict[str, list[dict[str, Any]]]) -> str:
    """Return a line of the table."""
    found = [[cell["exact"] for cell in by_task.get(task, ())] for task in TASKS]
    scores = [f"{mean(exact):.0%} ({min(exact):.0%}, n = {len(exact)})" if exact else "" for exact in found]
    all_cells = [cell for own in by_task.values() for cell in own]
    steps = "/".join(sorted({str(cell["steps"]) for cell in all_cells}, key=int))
    seconds = max(cell["seconds"] for cell in all_cells)
    return f"| {int(n):,} | {setting} | {' | '.join(scores)} | {steps} | {seconds:.0f} |"


if __name__ == "__main__":
    run(main)
