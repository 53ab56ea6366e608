"""Prepare the Dolly data set (15k instructions, Databricks 2023) for finetuning.

    python scripts/prepare_dolly.py --checkpoint_dir checkpoints/tiiuae/falcon-7b

Downloads it unless --data_path gives a local copy, prints an audit of what is supervised, and writes data/dolly.
"""

from pathlib import Path

from lit_gpt.checkpoints.folder import check_checkpoint_dir
from lit_gpt.cli import Fraction, run
from lit_gpt.data.args import ALIASES, ColumnArgs, PrepareArgs
from lit_gpt.data.sources import Source, source_file
from lit_gpt.files import check_new

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")
out_dir: Path = Path("data/dolly")  # Write to this folder.
data_path: Path | None = None  # Read a local .json, .jsonl or .csv file in Dolly's form (null: download).
validation_fraction: Fraction = 0.04
prompt_style: str = "alpaca"
input_column: str = "context"
output_column: str = "response"

# The data set on the hub and its file; CC BY-SA 3.0.
SOURCE = ("databricks/databricks-dolly-15k", "databricks-dolly-15k.jsonl")


def main(args: PrepareArgs, columns: ColumnArgs) -> None:
    check_checkpoint_dir(args.checkpoint_dir, converted=False)
    check_new(out_dir)
    if data_path:
        Source(str(data_path)).check()
    from lit_gpt.data.prepare import prepare

    prepare(args, columns, out_dir, str(data_path or source_file(*SOURCE)))


if __name__ == "__main__":
    run(main, aliases=ALIASES)
