"""Prepare the cleaned Alpaca data set (52k instructions) for finetuning.

    python scripts/prepare_alpaca.py --checkpoint_dir checkpoints/tiiuae/falcon-7b

Downloads it unless --data_path gives a local copy, prints an audit of what is supervised, and writes data/alpaca.
"""

from pathlib import Path

from lit_gpt.checkpoints.folder import check_checkpoint_dir
from lit_gpt.cli import Fraction, run
from lit_gpt.data.args import ALIASES, ColumnArgs, PrepareArgs
from lit_gpt.data.sources import Source, source_file
from lit_gpt.files import check_new

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")
out_dir: Path = Path("data/alpaca")  # Write to this folder.
data_path: Path | None = None  # Read a local .json, .jsonl or .csv file in Alpaca's form (null: download).
validation_fraction: Fraction = 0.04
prompt_style: str = "alpaca"

# The data set on the hub and its file; CC BY-NC 4.0.
SOURCE = ("yahma/alpaca-cleaned", "alpaca_data_cleaned.json")


def main(args: PrepareArgs, columns: ColumnArgs) -> None:
    check_checkpoint_dir(args.checkpoint_dir, converted=False)
    check_new(out_dir)
    if data_path:
        Source(str(data_path)).check()
    from lit_gpt.data.prepare import prepare

    prepare(args, columns, out_dir, str(data_path or source_file(*SOURCE)))


if __name__ == "__main__":
    run(main, aliases=ALIASES)
