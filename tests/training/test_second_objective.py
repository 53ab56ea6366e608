"""A second objective is one file: finetuned for, killed and resumed, planned, generated with, on two processes."""

import json

import pytest
import torch

from helpers.cli import run_process, spawn
from helpers.runs import metrics, same_run, wait_for_step, weights_of

SCRIPT = "tests/training/second_objective.py"


pytestmark = pytest.mark.subprocess


def finish(**flags) -> str:
    result = run_process(SCRIPT, **flags)
    assert result.code == 0, result
    return result.out


def test_it_goes_all_the_way(cli, flags, tmp_path, monkeypatch):
    monkeypatch.setenv("ACTION", "finetune")
    flags |= {"objective": "even", "optimizer": "sgd", "learning_rate": 0.05, "lora_dropout": 0.0, "max_steps": 8}
    finish(**flags)
    killed = flags | {"out_dir": tmp_path / "killed", "resume": "auto"}
    process = spawn(SCRIPT, **killed)
    wait_for_step(process, killed["out_dir"], 3)
    process.kill()
    process.communicate()
    assert "resumed after step" in finish(**killed)
    weights, again = (weights_of(out_dir, "lora") for out_dir in (flags["out_dir"], killed["out_dir"]))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert metrics(flags["out_dir"]) == metrics(killed["out_dir"])
    two = flags | {"out_dir": tmp_path / "two", "devices": 2, "strategy": "ddp"}
    finish(**two)
    same_run(flags["out_dir"], two["out_dir"], "lora")
    summary = json.loads((flags["out_dir"] / "summary.json").read_text())
    assert summary["objective"] == "even" and summary["val_loss_last"] < summary["val_loss_first"]
    # other rows of the batch, the same mean
    cut = flags | {"out_dir": tmp_path / "cut", "micro_batch_size": 1}
    finish(**cut)
    same_run(flags["out_dir"], cut["out_dir"], "lora")
    cli("finetune/lora.py", **flags | {"out_dir": tmp_path / "x"}).refused("--objective even", "sft", code=2)

    prompt = {"checkpoint_dir": flags["checkpoint_dir"], "prompt": "Say it.", "temperature": 0, "precision": "fp32"}
    answers = [
        cli("generate/lora.py", lora_path=out_dir / "lit_model_lora_finetuned.pth", **prompt)
        for out_dir in (flags["out_dir"], killed["out_dir"])
    ]
    assert answers[0].code == 0 and answers[0].out == answers[1].out
    assert answers[0].out != cli("generate/base.py", **prompt).out


def test_the_plan_knows_it(cli, monkeypatch):
    monkeypatch.setenv("ACTION", "plan")
    flags = {"model": "pythia-70m", "micro_batch_size": 4, "max_seq_length": 64, "json": "true", "device": "cuda"}
    even, sft = json.loads(finish(objective="even", **flags)), json.loads(cli("scripts/plan.py", **flags).out)
    same = ("parameters", "trainable", "weights", "gradients", "optimizer", "tokens", "save", "merge")
    assert {name: even[name] for name in same} == {name: sft[name] for name in same}
    activations, of_sft = (plan["backward_begins"] - plan["save"] for plan in (even, sft))
    assert activations > 3 * of_sft  # the model runs over the row once for each of its four samples
