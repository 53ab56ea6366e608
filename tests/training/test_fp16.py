"""Training in fp16: the loss is scaled so that gradients stay in range, on any number of ranks and when resumed."""

import pytest
import torch

from helpers.cli import spawn
from helpers.runs import final, metrics
from lit_gpt.checkpoints import io
from lit_gpt.training.strategy import LossScale

SCRIPT = "finetune/lora.py"


def losses(out_dir) -> list[float]:
    return [float(row["loss"]) for row in metrics(out_dir) if row["loss"]]


def scale_of(out_dir) -> dict:
    """Return the loss scale that the newest state holds."""
    return io.load(max((out_dir / "state").iterdir()))["resume"]["optimizer"]["loss_scale"]


def test_a_scale_adapts():
    scale = LossScale(factor=8.0)
    assert not scale.update(finite=False) and scale.factor == 4.0
    assert all(scale.update(finite=True) for _ in range(LossScale.GROWTH_INTERVAL - 1)) and scale.factor == 4.0
    assert scale.update(finite=True) and scale == LossScale(8.0, 0)
    assert [scale.update(finite=False) for _ in range(4)] == [False, False, False, True]  # at 1 it is as it is


def test_the_losses_are_those_of_fp32(cli, flags, monkeypatch):
    """Also where the first scale is far too large; a resumed run goes on with the scale that it had."""
    flags |= {"max_steps": 4, "eval_interval": 4}
    assert cli(SCRIPT, **flags).code == 0
    half = flags | {"precision": "fp16", "out_dir": flags["out_dir"].with_name("half"), "resume": "auto"}
    monkeypatch.setattr(LossScale.__init__, "__defaults__", (2.0**40, 0))
    result = cli(SCRIPT, **half)
    assert result.code == 0 and "overflowed" in result.out, result.err
    assert losses(half["out_dir"]) == pytest.approx(losses(flags["out_dir"]), rel=1e-2)
    last, expected = scale_of(half["out_dir"]), final(half["out_dir"])
    assert 1 < last["factor"] < 2.0**40 and last["steps"] > 0
    max((half["out_dir"] / "state").iterdir()).unlink()
    result = cli(SCRIPT, **half)
    assert "resumed after step 3" in result.out and "overflowed" not in result.out
    assert scale_of(half["out_dir"]) == last
    found = final(half["out_dir"])
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.subprocess
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_processes_scale_as_one(cli, flags, strategy, method):
    """They overflow and go on together."""
    flags |= {"precision": "fp16", "max_steps": 4, "eval_interval": 4}
    if method == "full":
        flags = {name: value for name, value in flags.items() if not name.startswith("lora")}
    assert cli(f"finetune/{method}.py", **flags).code == 0
    two = flags | {"out_dir": flags["out_dir"].with_name("two"), "devices": 2, "strategy": strategy}
    out, err = (process := spawn(f"finetune/{method}.py", **two)).communicate(timeout=120)
    assert process.returncode == 0, (out, err)
    assert losses(two["out_dir"]) == pytest.approx(losses(flags["out_dir"]), rel=1e-2)
    assert scale_of(two["out_dir"]) == scale_of(flags["out_dir"])


@pytest.mark.parametrize(
    ("script", "other"),
    [
        (SCRIPT, {"strategy": "deepspeed"}),
        (SCRIPT, {"optimizer_in_backward": "true", "micro_batch_size": 6}),
        ("finetune/full.py", {"master_weights": "false"}),
    ],
)
def test_what_does_not_scale_is_refused(cli, flags, script, other):
    if "full" in script:
        flags = {name: value for name, value in flags.items() if not name.startswith("lora")}
    cli(script, **flags | {"precision": "fp16"} | other).refused("--precision fp16", f"--{next(iter(other))}", code=2)
