"""Prepare your own data for finetuning: files, data sets of the Hugging Face hub, or several of them.

    python scripts/prepare_json.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --data_path my.jsonl \\
        --out_dir data/mine

Rows come from .json, .jsonl, .csv and .parquet files, from a folder that `datasets` has saved, or from the hub as
OWNER/NAME, OWNER/NAME:SPLIT or OWNER/NAME:CONFIG:SPLIT. A row holds either instruction, input (may be absent) and
output, or messages: a list of {"role", "content"}, and perhaps tools. Rows are streamed, so that files may be larger
than memory. Prints an audit of what is supervised; refuses rows from which nothing could be learned.
"""

from pathlib import Path

from lit_gpt.checkpoints.folder import check_checkpoint_dir
from lit_gpt.cli import Fraction, run
from lit_gpt.data.args import ALIASES, ColumnArgs, PrepareArgs
from lit_gpt.data.sources import parse_sources
from lit_gpt.errors import UsageError
from lit_gpt.files import check_new

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")
data_path: str | None = None  # Read these rows; several, with weights: a.jsonl,b.parquet=0.5 (half of b's rows).
validation_path: str | None = None  # Validate on these rows (null: split some off data_path).
out_dir: Path | None = None  # Write to this folder, such as data/mine.
validation_fraction: Fraction = 0.05


def main(args: PrepareArgs, columns: ColumnArgs) -> None:
    if data_path is None:
        raise UsageError("--data_path: expected a path")
    if out_dir is None:
        raise UsageError("--out_dir: expected a path")
    check_checkpoint_dir(args.checkpoint_dir, converted=False)
    check_new(out_dir)
    for source in [*parse_sources(data_path), *parse_sources(validation_path or data_path)]:
        source.check()
    from lit_gpt.data.prepare import prepare

    prepare(args, columns, out_dir, data_path, validation_path)


if __name__ == "__main__":
    run(main, aliases=ALIASES)
