"""Adapters for PEFT of IA3 and of learned prompts: what it computes with them is what was trained."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers.compare import off
from helpers.exports import EXPORT
from helpers.methods import as_if_trained, make
from helpers.tiny_models import make_base
from lit_gpt import GPT, Tokenizer
from lit_gpt.checkpoints import folder as checkpoint
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.conversion import export
from lit_gpt.methods import finetuned_file
from lit_gpt.text.prompt_style import PromptStyle

LAYOUTS = [("llama", "llama3"), ("falcon", "40b"), ("gemma", "gemma2")]  # apart, fused, scaled embeddings


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: make_base(root / family, family, layout) for family, layout in LAYOUTS}


def trained_file(base: Path, name: str, path: Path) -> tuple[Path, GPT]:
    """Return what a finetune would have left, and its model."""
    torch.manual_seed(1)
    method, model = make(name), load_model(base)
    method.attach(model)
    method.initialize(model)
    as_if_trained(model)
    style = PromptStyle.from_name("alpaca", Tokenizer(base)).to_dict()
    record = {"hyperparameters": method.settings, "prompt_style": style}
    fingerprint = checkpoint.fingerprint(checkpoint.load_state(base))
    finetuned_file.save_file(path, method.name, fingerprint, finetuned_file.trained_state(model), **record)
    return path, model


@pytest.mark.parametrize("name", ["IA3", "prompt tuning", "P-tuning", "prefix tuning"])
@pytest.mark.parametrize("family", [family for family, _ in LAYOUTS])
@torch.no_grad()
def test_peft_computes_the_same(bases, tmp_path, family, name):
    base = bases[family]
    path, model = trained_file(base, name, tmp_path / "f.pth")
    assert export.to_peft(base, path, tmp_path / "peft")["reader"] == "PEFT"
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "peft")
    idx = torch.randint(320, (2, 20), generator=torch.Generator().manual_seed(3))
    told = torch.cat((torch.tensor(model.virtual_tokens).long().expand(2, -1), idx), dim=1)
    assert off(theirs(idx).logits[:, -20:], model(told)[:, -20:]) < 1e-5
    kind = {"IA3": "IA3", "prefix tuning": "PREFIX_TUNING"}.get(name, "PROMPT_TUNING")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["peft_type"] == kind


def test_what_peft_does_not_have_is_refused(cli, bases, tmp_path):
    path, _ = trained_file(bases["llama"], "Houlsby", tmp_path / "f.pth")
    flags = {"checkpoint_dir": bases["llama"], "finetuned_path": path, "out_dir": tmp_path / "peft"}
    cli(EXPORT, **flags).refused("f.pth", "bottleneck", "PEFT does not have")
    assert not (tmp_path / "peft").exists()
