"""Defines the flags that the prepare scripts share. Nothing here imports torch."""

from dataclasses import dataclass
from pathlib import Path

from lit_gpt.cli import Fraction, NonNegativeInt, PositiveInt

ALIASES = {"destination_path": "out_dir", "json_path": "data_path"}  # spellings of before


@dataclass(frozen=True)
class PrepareArgs:
    """Preparing data"""

    checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # Use the tokenizer of this folder.
    validation_fraction: Fraction = 0.05  # Validate on this share of the samples.
    prompt_style: str = "auto"  # Render in this style, or a Jinja file (auto: the checkpoint's or alpaca).
    mask_inputs: bool = True  # Learn the answers only, not the prompts.
    max_seq_length: PositiveInt | None = None  # Cut longer samples to this many tokens (null: what the model takes).
    allow_unsupervised: bool = False  # Drop samples with no supervised token instead of refusing.
    skip_bad_rows: bool = False  # Drop and count rows that cannot be read or that the template refuses.
    deduplicate: bool = False  # Drop samples that render as an earlier one does.
    seed: NonNegativeInt = 42  # Seed the choice of validation samples.


@dataclass(frozen=True)
class ColumnArgs:
    """Columns of a row"""

    instruction_column: str = "instruction"  # Read the instruction from this column.
    input_column: str = "input"  # Read its context from this column, which may be absent.
    output_column: str = "output"  # Read the answer from this column.
    messages_column: str = "messages"  # Read messages from this column; rows that have it need no other.
