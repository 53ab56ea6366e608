"""What each way to quantize costs in perplexity, all on one text.

    python benchmarks/quantize_quality.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct \\
        --rows shared/data/gsm8k_train.jsonl

Scores the first rows of a file and calibrates on rows that come after them; each row is its values, one below the
other. Every quantized checkpoint is written by scripts/quantize.py and scored by eval/perplexity.py, as users would.
Writes quantize_quality.md.
"""

import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from lit_gpt.cli import PositiveInt, run

checkpoint_dir: Path = Path("checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct")  # converted folder
rows: Path = Path("gsm8k_train.jsonl")  # rows of text
scored: PositiveInt = 60  # rows at the beginning that are scored
skipped: PositiveInt = 1000  # rows before those that are calibrated on
window: PositiveInt = 1024  # tokens read at once
out_dir: Path = Path("benchmarks/results")  # folder for the result

ROOT = Path(__file__).parent.parent
NEAREST = ("--rounding", "nearest")


def script(path: str, *flags: object) -> str:
    argv = [sys.executable, str(ROOT / path), *map(str, flags)]
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout


def perplexity(folder: Path, text: Path) -> float:
    flags = "--checkpoint_dir", folder, "--text_path", text, "--window", window, "--json", "true"
    return json.loads(script("eval/perplexity.py", *flags))["perplexity"]


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        with open(rows, encoding="utf-8") as lines:
            texts = ["\n".join(filter(None, json.loads(line).values())) for line in lines]
        parts = {"scored": texts[:scored], "calibration": texts[skipped:]}
        for name, part in parts.items():
            (work / name).write_text("\n\n".join(part), encoding="utf-8")
        ways = {"int8, to the nearest": ("int8", *NEAREST)}
        for format in ("int4", "nf4", "nf4-dq"):
            ways[f"{format}, to the nearest"] = format, *NEAREST
            ways[f"{format}, calibrated on the model's own text"] = (format,)
            ways[f"{format}, calibrated on rows like those scored"] = format, "--calibration_path", work / "calibration"
        full = perplexity(checkpoint_dir, work / "scored")
        size = (checkpoint_dir / "lit_model.pth").stat().st_size
        found = [("bf16", full, size)]
        for n, (name, flags) in enumerate(ways.items()):
            folder = work / str(n)
            script("scripts/quantize.py", "--checkpoint_dir", checkpoint_dir, "--out_dir", folder, "--quantize", *flags)
            found.append((name, perplexity(folder, work / "scored"), (folder / "lit_model.pth").stat().st_size))
            print(*found[-1], file=sys.stderr)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "quantize_quality.md").write_text(table(full, found))


def table(full: float, found: list[tuple[str, float, int]]) -> str:
    import torch
    from peers.report import command, fill, machine

    about = machine(torch.get_num_threads())
    rows = "\n".join(
        f"| {name} | {value:.3f} | {value / full - 1:+.1%} | {size / 1e6:.0f} MB |" for name, value, size in found
    )
    notes = (
        f"The first {scored} rows of {rows.name}, in windows of {window} tokens, each token scored once after "
        f"at least half a window; bf16 arithmetic. Calibrated on 8,192 tokens, of rows {skipped} and on or written "
        "by the model itself."
    )
    return f"""# What quantization costs: {checkpoint_dir.name}

`{command("quantize_quality")}`

{about["cores"]} cores of {about["cpu"]}, torch {torch.__version__}; {date.today().isoformat()}.

| | perplexity | change | weights |
|---|---:|---:|---:|
{rows}

{fill(notes)}
"""


if __name__ == "__main__":
    run(main)
