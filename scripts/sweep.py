"""Finetune once for each of several settings, and put the results in order.

    python scripts/sweep.py --sweep_path sweep.yaml --out_dir out/sweep

sweep.yaml names the script, the flags that all runs share, and those that vary: a grid, of which every combination is
run, or settings one by one:

    script: finetune/lora.py
    common: {checkpoint_dir: checkpoints/tiiuae/falcon-7b, data_dir: data/alpaca, max_steps: 200}
    grid: {learning_rate: [0.0001, 0.0003], lora_r: [8, 32]}
    settings: [{lora_update: dora}]

Each run has a folder of its own below out_dir, and beside it a log. The same command goes on after it was stopped.
sweep.csv and report.html have the runs that have ended, the lowest validation loss first.
"""

from pathlib import Path

from lit_gpt.cli import NonNegativeInt, PositiveInt, run
from lit_gpt.errors import UsageError, UserError

sweep_path: Path | None = None  # Read the settings from this JSON or YAML file.
out_dir: Path | None = None  # Write the runs' folders, sweep.csv and report.html here.
parallel: PositiveInt = 1  # Run this many at a time.
only: NonNegativeInt | None = None  # Run this one alone, counted from 0 ($SLURM_ARRAY_TASK_ID of an array of jobs).


def main() -> None:
    if sweep_path is None:
        raise UsageError("--sweep_path: expected a JSON or YAML file of settings; --help shows one")
    if out_dir is None:
        raise UsageError("--out_dir: expected a folder to write to")
    from lit_gpt.reporting.sweep import Sweep

    sweep = Sweep.read(sweep_path, out_dir)
    if only is not None and only >= len(sweep.runs):
        raise UsageError(f"--only {only}: {sweep_path} makes {len(sweep.runs)} runs, counted from 0")
    sweep.run(parallel, only)
    for place, ended in enumerate(sweep.report(), 1):
        print(f"{place:3}  {sweep.summary(ended).get('val_loss_last', float('nan')):8.4f}  {ended.name}")
    print(f"wrote {out_dir / 'sweep.csv'} and {out_dir / 'report.html'}")
    if sweep.failed:
        name, line = next(iter(sweep.failed.items()))
        raise UserError(f"{len(sweep.failed)} of {len(sweep.runs)} runs failed; {name}: {line}")


if __name__ == "__main__":
    run(main)
