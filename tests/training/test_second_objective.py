"""A second objective is one file: trained for, killed and resumed, on two processes; the loop knows nothing of it."""

import json

import pytest
import torch

from helpers.cli import spawn
from helpers.runs import metrics, same_run, wait_for_step, weights_of

SCRIPT = "tests/training/second_objective.py"


def finish(**flags) -> None:
    out, err = (process := spawn(SCRIPT, **flags)).communicate(timeout=120)
    assert process.returncode == 0, (out, err)


@pytest.mark.subprocess
def test_it_is_trained_for(cli, flags, tmp_path):
    flags |= {"objective": "even", "optimizer": "sgd", "learning_rate": 0.05, "lora_dropout": 0.0, "max_steps": 8}
    finish(**flags)
    killed = flags | {"out_dir": tmp_path / "killed", "resume": "auto"}
    process = spawn(SCRIPT, **killed)
    wait_for_step(process, killed["out_dir"], 3)
    process.kill()
    process.communicate()
    finish(**killed)
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
