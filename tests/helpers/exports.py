"""Prepare checkpoints for export, and judge what was converted and exported."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.compare import TOLERANCE, off, tokens
from lit_gpt import Tokenizer
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.checkpoints.folder import load_state
from lit_gpt.conversion import hf, hf_shards
from lit_gpt.text.prompt_style import PromptStyle

EXPORT = "scripts/convert_lit_checkpoint.py"


def finetuned(base: Path, root: Path) -> Path:
    """Make a checkpoint as a full finetune leaves it, with a prompt style of its own."""
    folder = root / "finetuned"
    shutil.copytree(base, folder)
    PromptStyle.from_name("alpaca", Tokenizer(base)).save(folder)
    return folder


def assert_dequantized(folder: Path, expected: dict[str, Tensor]) -> None:
    """Convert a folder of quantized weights, and assert that what is exported equals these, and computes the same."""
    hf.convert(folder, hf_shards.StoredWeights(folder))
    hf.export(folder, folder / "hf", load_state(folder))
    exported = load_file(folder / "hf" / "model.safetensors")
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    theirs = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    with torch.no_grad():
        assert off(load_model(folder, torch.float32)(tokens(theirs)), theirs(tokens(theirs)).logits) < TOLERANCE
