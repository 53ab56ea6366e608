"""Put finetuning runs side by side in one HTML page: curves, results, and the hyperparameters in which they differ.

    python scripts/report.py out/lora/a out/lora/b --out out/report.html

The page needs no network and no script, reads well on a phone, and can be printed. Runs under way, and runs that ended
early, are shown as such.
"""

from pathlib import Path

from lit_gpt.cli import run

out_dirs: list[Path] = []  # Compare what finetune/* wrote, one folder or several.
out: Path = Path("out/report.html")  # Write this page; an older report there is replaced.


def main() -> None:
    from lit_gpt.reporting.report import report

    report(out_dirs, out)


if __name__ == "__main__":
    run(main, aliases={"report_path": "out"})
