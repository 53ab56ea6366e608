"""A fifth method is one file: finetuned, killed and resumed, planned, generated with, merged, on two processes."""

import json

import pytest
import torch

from helpers.cli import run_process, spawn
from helpers.runs import metrics, same_run, wait_for_step, weights_of
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.generation.steps.native import NativeStep
from lit_gpt.methods.finetuned_model import load_finetuned
from methods.fifth_method import Scale, ScaleConfig

SCRIPT = "tests/methods/fifth_method.py"
pytestmark = pytest.mark.subprocess


@pytest.fixture
def scale_flags(flags, monkeypatch) -> dict:
    monkeypatch.setenv("ACTION", "finetune")
    monkeypatch.setenv("CHECKPOINT_DIR", str(flags["checkpoint_dir"]))
    return {k: v for k, v in flags.items() if not k.startswith("lora")} | {"optimizer": "sgd", "learning_rate": 0.5}


def finish(**flags) -> str:
    result = run_process(SCRIPT, **flags)
    assert result.code == 0, result
    return result.out


def test_it_goes_all_the_way(scale_flags, tmp_path, monkeypatch):
    flags, path = scale_flags, scale_flags["out_dir"] / "lit_model_scale_finetuned.pth"
    finish(**flags)
    killed = flags | {"out_dir": tmp_path / "killed", "resume": "auto"}
    process = spawn(SCRIPT, **killed)
    wait_for_step(process, killed["out_dir"], 5)
    process.kill()
    process.communicate()
    assert "resumed after step" in finish(**killed)
    weights, again = (weights_of(out_dir, "scale") for out_dir in (flags["out_dir"], killed["out_dir"]))
    assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)
    assert metrics(flags["out_dir"]) == metrics(killed["out_dir"])
    assert all((scale != 1).any() for scale in weights.values())

    two = flags | {"out_dir": tmp_path / "two", "devices": 2, "strategy": "ddp"}
    finish(**two)
    same_run(flags["out_dir"], two["out_dir"], "scale")

    base = load_model(flags["checkpoint_dir"], torch.float32)
    model, record = load_finetuned(flags["checkpoint_dir"], path, None, torch.float32)
    idx = torch.randint(90, (1, 9), generator=torch.Generator().manual_seed(0))
    logits = model(idx)
    assert not torch.allclose(logits, base(idx), atol=1e-3) and record["method"] == "scale"
    NativeStep(model)  # which knows the layer by what it records
    merged = Scale(ScaleConfig()).merge(model)
    assert torch.allclose(merged(idx), logits, atol=1e-5)

    monkeypatch.setenv("ACTION", "generate")
    answer = finish(finetuned_path=path, prompt="Say it.", temperature=0, max_new_tokens=5, precision="fp32")
    assert answer == finish(finetuned_path=path, prompt="Say it.", temperature=0, max_new_tokens=5, precision="fp32")


def test_the_plan_knows_it(scale_flags, monkeypatch):
    monkeypatch.setenv("ACTION", "plan")
    plan = json.loads(finish(model="pythia-70m", method="scale", max_seq_length=64, scale_start_layer=2, json="true"))
    assert plan["trainable"] == 4 * 512 and plan["merge"] > 0
