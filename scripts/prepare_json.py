"""Prepare your own data for finetuning: files, data sets of the Hugging Face hub, or several of them.

    python scripts/prepare_json.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --json_path my.jsonl \\
        --destination_path data/mine

Rows come from .json, .jsonl, .csv and .parquet files, from a folder that `datasets` has saved, or from the hub as
OWNER/NAME, OWNER/NAME:SPLIT or OWNER/NAME:CONFIG:SPLIT. A row holds either instruction, input (may be absent) and
output, or messages: a list of {"role", "content"}, and perhaps tools. Rows are streamed, so that files may be larger
than memory. Prints an audit of what is supervised; refuses rows from which nothing could be learnt.
"""

from pathlib import Path
from types import SimpleNamespace

from lit_gpt.cli import Fraction, NonNegativeInt, PositiveInt, run
from lit_gpt.errors import UsageError

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # folder whose tokenizer is used
json_path: str | None = None  # the rows; several, with weights: a.jsonl,b.parquet=0.5 (b: half of its rows, at random)
validation_path: str | None = None  # rows to validate on (null: split some off json_path)
destination_path: Path | None = None  # folder to write, such as data/mine
validation_fraction: Fraction = 0.05  # of the rows, for validation if there is no validation_path
instruction_column: str = "instruction"  # name of the column with the instruction
input_column: str = "input"  # name of the column with its context; may be absent
output_column: str = "output"  # name of the column with the answer
messages_column: str = "messages"  # name of the column with messages; rows that have it need no other
prompt_style: str = (
    "auto"  # a style of lit_gpt/text/prompt_style.py, checkpoint, auto (checkpoint or alpaca), or a Jinja file
)
mask_inputs: bool = True  # learn the answers only, not the prompts
max_seq_length: PositiveInt | None = None  # longer rows are cut to this many tokens (null: what the model takes)
allow_unsupervised: bool = False  # drop rows with no supervised token instead of refusing
skip_bad_rows: bool = False  # drop rows that cannot be read or that the template refuses, and count them
deduplicate: bool = False  # drop rows that render as an earlier one does
seed: NonNegativeInt = 42  # of the choice of validation rows


def main(hp: SimpleNamespace) -> None:
    for flag in ("json_path", "destination_path"):
        if getattr(hp, flag) is None:
            raise UsageError(f"--{flag}: expected a path")
    from lit_gpt.data.prepare import prepare

    prepare(hp, hp.json_path, hp.validation_path)


if __name__ == "__main__":
    run(main)
