"""Of each family a model goes through all the scripts: finetuned, merged, exported, loaded by transformers."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.compare import TOLERANCE, off, tokens
from helpers.tiny_models import LAYOUTS, tiny_hf_model
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.conversion import hf, hf_shards
from lit_gpt.methods import finetuned_model


def run(cli, script: str, **flags) -> None:
    result = cli(script, **flags)
    assert result.code == 0, result.err


@pytest.mark.parametrize(("family", "layout"), dict(LAYOUTS).items())
def test_finetune_merge_export(cli, llama, data_dir, tmp_path: Path, family: str, layout: str):
    """One layout of each. The logits are those of the base with LoRA apart, and no longer those of the base."""
    base, lora, merged, out = (tmp_path / name for name in ("base", "lora", "merged", "hf"))
    tiny_hf_model(family, layout, vocab_size=320, max_position_embeddings=256).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):  # what the data is prepared with
        shutil.copyfile(llama / name, base / name)
    hf.convert(base, hf_shards.StoredWeights(base))
    every = {f"lora_{name}": "true" for name in ("key", "projection", "mlp", "head")}
    flags = dict(max_steps=3, batch_size=4, micro_batch_size=2, warmup_steps=1, learning_rate=0.02, eval_samples=4)
    path = lora / "lit_model_lora_finetuned.pth"
    run(cli, "finetune/lora.py", checkpoint_dir=base, data_dir=data_dir, out_dir=lora, precision="fp32",
        sample_tokens=1, **flags, **every)  # fmt: skip
    run(cli, "scripts/merge_lora.py", checkpoint_dir=base, lora_path=path, out_dir=merged)
    run(cli, "scripts/convert_lit_checkpoint.py", checkpoint_dir=merged, out_dir=out)
    theirs, (ours, _) = AutoModelForCausalLM.from_pretrained(out), finetuned_model.load_finetuned(base, path, "lora")
    idx = tokens(theirs)
    with torch.no_grad():
        found, expected = theirs(idx).logits, ours(idx)
        assert off(found, expected) < TOLERANCE and off(found, load_model(base)(idx)) > 1e-2
