"""Prepare the cleaned Alpaca data set (52k instructions) for finetuning.

    python scripts/prepare_alpaca.py --checkpoint_dir checkpoints/tiiuae/falcon-7b

Downloads it unless --json_path gives a local copy, prints an audit of what is supervised, and writes data/alpaca.
"""

from pathlib import Path
from types import SimpleNamespace

from lit_gpt.cli import Fraction, NonNegativeInt, PositiveInt, run

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # folder whose tokenizer is used
destination_path: Path = Path("data/alpaca")  # folder to write
json_path: Path | None = None  # a local .json, .jsonl or .csv file in Alpaca's form (null: download)
validation_fraction: Fraction = 0.04  # of the rows, for validation
prompt_style: str = (
    "alpaca"  # a style of lit_gpt/text/prompt_style.py, checkpoint, auto (checkpoint or alpaca), or a Jinja file
)
mask_inputs: bool = True  # learn the answers only, not the prompts
max_seq_length: PositiveInt | None = None  # longer rows are cut to this many tokens (null: what the model takes)
allow_unsupervised: bool = False  # drop rows with no supervised token instead of refusing
seed: NonNegativeInt = 42  # of the choice of validation rows

# data set on the hub and its file; CC BY-NC 4.0
SOURCE = ("yahma/alpaca-cleaned", "alpaca_data_cleaned.json")
COLUMNS = {"messages_column": "messages", "instruction_column": "instruction", "input_column": "input",
           "output_column": "output"}  # fmt: skip


def main(hp: SimpleNamespace) -> None:
    from lit_gpt.data.prepare import prepare
    from lit_gpt.data.sources import source_file

    prepare(
        SimpleNamespace(**vars(hp), **COLUMNS, skip_bad_rows=False, deduplicate=False),
        str(hp.json_path or source_file(*SOURCE)),
    )


if __name__ == "__main__":
    run(main)
