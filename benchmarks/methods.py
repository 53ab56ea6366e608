"""The four methods on one model and one data set: what trains, time, memory, validation loss, and generation.

    python benchmarks/methods.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --data_dir data/gsm8k
    python benchmarks/methods.py --model falcon-7b

Runs the finetune and generate scripts themselves, one after another, and writes methods_cpu.md, .json, _time.png and
_memory.png, or with a GPU methods_cuda.*: the table of the article "Finetuning Falcon LLMs More Efficiently With LoRA
and Adapters" (Raschka 2023), with this code's memory plan beside what was measured.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peers.environment import random_model

from lit_gpt.cli import PositiveInt, run
from lit_gpt.errors import UsageError, UserError

checkpoint_dir: Path | None = None  # converted folder
data_dir: Path | None = None  # prepared data
model: str | None = None  # instead of both: random weights of this size, such as falcon-7b, and random rows
out_dir: Path = Path("benchmarks/results")  # folder for the results
steps: PositiveInt = 20  # optimizer steps of each method
batch_size: PositiveInt = 8  # samples per step
eval_samples: PositiveInt = 20  # samples of the validation loss
max_new_tokens: PositiveInt = 64  # generated, at batch 1

ROOT = Path(__file__).parent.parent
# the learning rates are the scripts' own, and so is all else
METHODS = {"adapter": "Adapter", "adapter_v2": "Adapter v2", "lora": "LoRA (q, v)", "full": "full"}
ON_GPU = {"full": ["--optimizer_in_backward=true", "--optimizer=adamw8bit", "--master_weights=false"]}


def main() -> None:
    global checkpoint_dir, data_dir  # random ones may take their place
    import torch

    if bool(model) == bool(checkpoint_dir and data_dir):
        raise UsageError("--model: expected either it, or --checkpoint_dir and --data_dir")
    with tempfile.TemporaryDirectory() as folder:
        if model:
            rows = steps * batch_size
            checkpoint_dir, data_dir = random_model(model, {}, rows, 1337, Path(folder))
        found = {method: measure(method, Path(folder), torch.cuda.is_available()) for method in METHODS}
    report(found, "methods_cuda" if torch.cuda.is_available() else "methods_cpu")


def measure(method: str, folder: Path, cuda: bool) -> dict[str, Any]:
    """Finetune by the method and generate from the result: the run's summary, and the figures of the answer."""
    out, script = folder / method, f"{method}.py"
    one_row = [f"--micro_batch_size={batch_size}"] if cuda and method in ON_GPU else []
    call([
        ROOT / "finetune" / script, f"--checkpoint_dir={checkpoint_dir}", f"--data_dir={data_dir}",
        f"--out_dir={out}", f"--max_steps={steps}", f"--warmup_steps={steps // 10}", "--save_interval=1000000",
        f"--batch_size={batch_size}", f"--eval_samples={eval_samples}", "--sample_tokens=0", "--seed=1337",
        *(ON_GPU.get(method, []) if cuda else []), *one_row,
    ])  # fmt: skip
    file = out / f"lit_model_{method}_finetuned.pth"
    given = {"full": [], "lora": [f"--lora_path={file}"]}.get(method, [f"--adapter_path={file}"])
    said = call([
        ROOT / "generate" / script, f"--checkpoint_dir={out if method == 'full' else checkpoint_dir}", *given,
        "--prompt=How many apples are left?", "--temperature=0", f"--max_new_tokens={max_new_tokens}",
    ])  # fmt: skip
    speed, memory = re.search(r"([\d.]+) tokens/s; peak memory ([\d.]+) GB", said).groups()
    summary = json.loads((out / "summary.json").read_text())
    return summary | {"generation_tokens_per_second": float(speed), "generation_memory_gb": float(memory)}


def call(argv: list[Any]) -> str:
    """What the script says on stderr.

    Raises:
        UserError: it fails.
    """
    result = subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"{Path(argv[0]).name}: {result.stderr.strip().splitlines()[-1]}")
    print(result.stdout[-400:])
    return result.stderr


def report(found: dict[str, dict[str, Any]], stem: str) -> None:
    from datetime import date

    import torch
    from peers.report import command, machine

    place = machine(torch.get_num_threads())
    contents = {"command": command("methods"), "machine": place, "torch": torch.__version__, "date": str(date.today())}
    name = model or Path(checkpoint_dir).name
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / f"{stem}.json").write_text(json.dumps(contents | {"model": name, "methods": found}, indent=2) + "\n")
    device = place.get("gpu") or f"{place['cpu']}, {place['cores']} cores, {' '.join(place['extensions'])}"
    lines = [
        f"# The four methods: {name}",
        f"`{contents['command']}` on {device}; torch {torch.__version__}, Python {sys.version.split()[0]}; "
        f"{contents['date']}. {steps} steps of batch {batch_size} with each script's own hyperparameters.",
        "\n".join([*HEAD, *(row(METHODS[method], f) for method, f in found.items())]),
        f"![time]({stem}_time.png)\n![memory]({stem}_memory.png)",
        "A step's memory is the peak of a training step on the longest packed row, over the loaded model, as the run "
        "plans it (see `scripts/plan.py`) and then measures it before step 1: on a CPU the resident memory, on a GPU "
        "what is allocated. The peak is the whole process's, on a CPU with Python and the libraries.",
    ]
    (out_dir / f"{stem}.md").write_text("\n\n".join(lines) + "\n")
    draw(out_dir / stem, found)
    print("\n".join(lines[2:3]) + f"\nwrote {out_dir / stem}.md")


HEAD = (
    "| method | trained parameters | training s | tokens/s | peak GB | step GB planned | step GB measured | off "
    "| val. loss before | after | generation tokens/s | GB |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
)


def row(title: str, f: dict[str, Any]) -> str:
    planned, measured = f["step_bytes_planned"] / 1e9, f["step_bytes_measured"] / 1e9
    cells = [
        title, f"{f['trainable_parameters']:,}", f"{f['seconds']:.0f}", f"{f['tokens_per_second']:.0f}",
        f"{f['peak_memory_bytes'] / 1e9:.2f}", f"{planned:.2f}", f"{measured:.2f}", f"{planned / measured - 1:+.0%}",
        f"{f['val_loss_first']:.3f}", f"{f['val_loss_last']:.3f}", f"{f['generation_tokens_per_second']:.1f}",
        f"{f['generation_memory_gb']:.2f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def draw(stem: Path, found: dict[str, dict[str, Any]]) -> None:
    """Two pictures like the article's: time, and memory of training and of generation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pictures = {
        "time": ("training time (s)", {"training": [f["seconds"] for f in found.values()]}),
        "memory": (
            "peak memory (GB)",
            {
                "training": [f["peak_memory_bytes"] / 1e9 for f in found.values()],
                "generation": [f["generation_memory_gb"] for f in found.values()],
            },
        ),
    }
    for name, (label, series) in pictures.items():
        figure, axes = pyplot.subplots(figsize=(6.5, 3.2), layout="constrained")
        for i, (title, values) in enumerate(series.items()):
            places = [n + i * 0.4 for n in range(len(values))]
            bars = axes.bar(places, values, width=0.38, label=title)
            axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=2)
        axes.set(ylabel=label)
        axes.margins(y=0.15)
        axes.set_xticks([n + 0.2 * (len(series) - 1) for n in range(len(found))], [METHODS[m] for m in found])
        if len(series) > 1:
            axes.legend()
        figure.savefig(f"{stem}_{name}.png", dpi=120)
        pyplot.close(figure)


if __name__ == "__main__":
    run(main)
