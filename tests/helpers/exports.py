"""Prepare checkpoints for export."""

import shutil
from pathlib import Path

from lit_gpt import Tokenizer
from lit_gpt.text.prompt_style import PromptStyle

EXPORT = "scripts/convert_lit_checkpoint.py"


def finetuned(base: Path, root: Path) -> Path:
    """Make a checkpoint as a full finetune leaves it, with a prompt style of its own."""
    folder = root / "finetuned"
    shutil.copytree(base, folder)
    PromptStyle.from_name("alpaca", Tokenizer(base)).save(folder)
    return folder
