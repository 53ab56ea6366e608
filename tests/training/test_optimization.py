"""Clipped gradients, a floor of the learning rate, and a trace of a few steps."""

import gzip
import json

import pytest
import torch

from helpers.runs import final, metrics
from lit_gpt.training.args import BatchArgs, OptimizationArgs
from lit_gpt.training.schedule import Schedule

SCRIPT = "finetune/lora.py"


def test_gradients_are_clipped_to_the_norm_that_is_asked_for(cli, flags):
    """One step of plain SGD is as long as the clipped gradient; the norm before clipping is recorded."""
    flags |= {"optimizer": "sgd", "learning_rate": 1.0, "weight_decay": 0, "warmup_steps": 0, "max_steps": 1}
    assert cli(SCRIPT, **flags).code == 0
    norm = float(metrics(flags["out_dir"])[-1]["grad_norm"])
    start = final(flags["out_dir"])
    clipped = flags | {"out_dir": flags["out_dir"].with_name("clipped"), "max_grad_norm": norm / 10}
    assert cli(SCRIPT, **clipped).code == 0
    assert float(metrics(clipped["out_dir"])[-1]["grad_norm"]) == norm
    end = final(clipped["out_dir"])
    # B is zero at first: what it is after one step is the step itself
    full, tenth = ([state[name] for name in state if name.endswith("lora_B")] for state in (start, end))
    assert all(torch.allclose(a / 10, b, rtol=1e-4, atol=1e-8) for a, b in zip(full, tenth, strict=True))


def test_clipping_is_refused_where_gradients_are_never_all_there(cli, flags):
    flags |= {"optimizer_in_backward": "true", "micro_batch_size": flags["batch_size"], "max_grad_norm": 1}
    cli(SCRIPT, **flags).refused("--max_grad_norm", "--optimizer_in_backward", code=2)


@pytest.mark.parametrize(("shape", "last"), [("cosine", 0.1), ("constant", 1.0)])
def test_the_cosine_ends_at_the_floor(shape, last):
    args = OptimizationArgs(learning_rate=1.0, min_lr=0.1, warmup_steps=2, max_steps=1000, schedule=shape)
    schedule = Schedule.from_args(args, BatchArgs(batch_size=4), 10)
    rates = [schedule.learning_rate(step) for step in range(1000)]
    assert rates[:2] == [0.5, 1.0] and rates[-1] == pytest.approx(last, abs=1e-4) and min(rates[2:]) >= last


def test_a_floor_above_the_peak_is_refused(cli, flags):
    cli(SCRIPT, **flags | {"min_lr": 1.0}).refused("--min_lr 1.0", "--learning_rate", code=2)


def test_a_trace_of_the_steps_that_are_asked_for(cli, flags):
    assert cli(SCRIPT, **flags | {"max_steps": 4, "profile_steps": 2}).code == 0
    with gzip.open(flags["out_dir"] / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    steps = {event["name"] for event in events if str(event.get("name", "")).startswith("ProfilerStep#")}
    assert len(steps) == 2
