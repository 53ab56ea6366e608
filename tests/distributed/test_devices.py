"""Runs on several processes: they train as one, and when one is lost the others end. Over gloo, on the CPU."""

import os
import signal
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from helpers.cli import run_process, spawn
from helpers.runs import of_method, same_run, wait_for_step, weights_of
from lit_gpt import hardware
from lit_gpt.distributed import heartbeat

METHODS = ["lora", "adapter", "adapter_v2", "full"]
SPREADS = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "zero2": {"strategy": "deepspeed"},
    "zero2-offload": {"strategy": "deepspeed", "zero_offload": "true"},
    "zero3": {"strategy": "deepspeed", "zero_stage": 3},
    "zero3-offload": {"strategy": "deepspeed", "zero_stage": 3, "zero_offload": "true"},
}
BRIEF = {f"{method}-{spread}" for method in ("lora", "full") for spread in ("ddp", "fsdp")} | {
    "lora-zero2",
    "full-zero3",
}
METHOD_AND_SPREAD = [
    pytest.param(method, spread, marks=() if f"{method}-{spread}" in BRIEF else pytest.mark.slow)
    for method in METHODS
    for spread in SPREADS
]


def some_slow(*brief: str) -> list:
    """Return all ways to spread a run; those but `brief` are slow."""
    return [pytest.param(name, marks=() if name in brief else pytest.mark.slow) for name in SPREADS]


@pytest.mark.subprocess
@pytest.mark.parametrize(("method", "spread"), METHOD_AND_SPREAD)
def test_two_processes_train_as_one(cli, flags, method, spread):
    """With dropout, ragged lengths, and a last step with fewer samples than ranks would share evenly."""
    script, flags = f"finetune/{method}.py", of_method(flags, method)
    flags |= {"epochs": 3, "max_steps": "null", "batch_size": 10, "micro_batch_size": "null", "micro_batch_tokens": 150}
    assert cli(script, **flags).code == 0
    two = flags | {"out_dir": flags["out_dir"].with_name("two"), "devices": 2, "resume": "auto"}
    result = run_process(script, **two | SPREADS[spread])
    assert result.code == 0, result
    same_run(flags["out_dir"], two["out_dir"], method)
    # what two processes saved, one goes on from
    newest = max((two["out_dir"] / "state").iterdir())
    newest.unlink()
    result = cli(script, **two | {"devices": 1})
    assert result.code == 0 and "resumed after step 4" in result.out, result.err
    same_run(flags["out_dir"], two["out_dir"], method)


@pytest.mark.subprocess
def test_two_processes_train_as_one_beside_quantized_weights(cli, flags):
    flags = of_method(flags, "lora") | {"quantize": "nf4", "max_steps": 4}
    assert cli("finetune/lora.py", **flags).code == 0
    two = flags | {"out_dir": flags["out_dir"].with_name("two"), "devices": 2, "strategy": "ddp"}
    result = run_process("finetune/lora.py", **two)
    assert result.code == 0, result
    same_run(flags["out_dir"], two["out_dir"], "lora")


@pytest.mark.subprocess
@pytest.mark.parametrize("spread", some_slow("ddp", "fsdp", "zero3-offload"))
def test_one_goes_on_in_two(cli, flags, spread):
    """From Adam's state of one process, and with frozen weights in bf16 under float32 updates."""
    flags |= {"precision": "bf16"}
    assert cli("finetune/lora.py", **flags).code == 0
    expected = weights_of(flags["out_dir"], "lora")
    max((flags["out_dir"] / "state").iterdir()).unlink()
    two = flags | {"devices": 2, "resume": "auto", "micro_batch_size": 3}
    result = run_process("finetune/lora.py", **two | SPREADS[spread])
    assert result.code == 0 and "resumed after step 11" in result.out, result
    found = weights_of(flags["out_dir"], "lora")
    assert all(torch.allclose(found[name], expected[name], atol=2e-3) for name in expected)


def children(process: subprocess.Popen) -> list[int]:
    found = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid=,args="], capture_output=True, text=True)
    return [int(line.split()[0]) for line in found.stdout.splitlines() if "finetune" in line]


@pytest.mark.subprocess
@pytest.mark.parametrize("spread", some_slow("zero2"))
def test_killed_ranks_go_on(cli, flags, spread):
    """As if they had never been killed."""
    flags = of_method(flags, "lora") | {"optimizer_args": '{"momentum": 0.9}', "max_grad_norm": 1, "max_steps": 6}
    assert cli("finetune/lora.py", **flags).code == 0
    two = flags | SPREADS[spread] | {"out_dir": flags["out_dir"].with_name("two"), "devices": 2, "resume": "auto"}
    process = spawn("finetune/lora.py", **two)
    wait_for_step(process, two["out_dir"], 3)
    for pid in (*children(process), process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    result = run_process("finetune/lora.py", **two)
    assert result.code == 0 and "resumed after step" in result.out, result
    same_run(flags["out_dir"], two["out_dir"], "lora")


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("victim", "number", "words"),
    [
        ("other", signal.SIGKILL, "lost touch with another process"),
        ("first", signal.SIGKILL, "lost touch with"),
        pytest.param("other", signal.SIGSTOP, "rank 1 has not been heard of", marks=pytest.mark.slow),
    ],
)
def test_a_lost_rank_ends_the_others_within_a_minute(flags, victim, number, words):
    """Killed, or silent; with one line each that says how to go on, and no process left behind."""
    flags |= {"devices": 2, "strategy": "ddp", "max_steps": 100000, "save_interval": 100000, "eval_interval": 100000}
    process = spawn("finetune/lora.py", **flags)
    wait_for_step(process, flags["out_dir"], 3)
    (other,) = children(process)
    os.kill(other if victim == "other" else process.pid, number)
    try:
        out, err = process.communicate(timeout=60)  # its children hold its pipes: all have ended
    finally:
        for pid in (other, process.pid):
            subprocess.run(["kill", "-9", str(pid)], capture_output=True)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode != 0 and len(errors) == 1, err
    assert words in errors[0] and "--resume auto" in errors[0] and "Traceback" not in err, err


@pytest.mark.subprocess
def test_a_write_that_fails_on_one_rank_ends_both(flags):
    """Only the first writes; with one line, and no rank waiting for the other."""
    flags |= {"devices": 2, "strategy": "ddp", "save_interval": 1000, "max_steps": 3}
    process = spawn("finetune/lora.py", **flags)
    deadline = time.monotonic() + 60
    while not flags["out_dir"].exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.001)
    (flags["out_dir"] / "state").write_text("in the way of the folder")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.count("error: ") == 1 and "state" in err and "Traceback" not in err, err


def test_no_thread_is_left_in_the_store(monkeypatch):
    """Python would abort, after all is done, if it ended while one is."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    strategy = SimpleNamespace(launcher=None)
    for _ in range(20):
        with heartbeat.peer_watchdog(
            SimpleNamespace(world_size=2, global_rank=0, strategy=strategy, barrier=lambda: None)
        ):
            pass
        assert not any(thread.name == "watch" for thread in threading.enumerate())


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_deepspeed_takes_its_settings(stage, offload):
    """DeepSpeed's own parser reads them as they are meant."""
    from deepspeed.runtime.config import DeepSpeedConfig

    from lit_gpt.distributed import deepspeed

    parsed = DeepSpeedConfig(deepspeed.config(stage, offload))
    place = parsed.zero_config.offload_optimizer.device
    assert parsed.zero_optimization_stage == stage and place == ("cpu" if offload else "none")
    assert (parsed.zero_config.offload_param is not None) == (stage == 3)
    assert not parsed.bfloat16_config.enabled and not parsed.float16_config.enabled
    assert parsed.gradient_accumulation_steps == 1 and parsed.zero_allow_untested_optimizer


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused where there is no CUDA device")
def test_a_device_that_is_not_there_is_refused(cli, flags, llama, data_dir):
    """In one line, which says what there is."""
    own, finetune = {"checkpoint_dir": llama}, "finetune/lora.py"
    for device in ("cuda", "mps"):
        cli(finetune, **flags | {"device": device}).refused(f"--device {device}", "auto", "cpu", code=2)
    ways = {
        "generate/base.py": {"prompt": "x"},
        "chat/base.py": {},
        "eval/perplexity.py": {"data_dir": data_dir},
        "eval/answers.py": {"data_dir": data_dir},
    }
    for script, given in ways.items():
        cli(script, **own | given | {"device": "cuda"}).refused("--device cuda", "cpu", code=2)
    cli(finetune, **flags | {"device": "tpu"}).refused("--device", "mps", code=2)


def test_a_device_that_is_there_is_taken(cli, flags, llama, monkeypatch):
    assert (
        cli("finetune/lora.py", **flags | {"device": "cpu", "devices": "auto", "max_steps": 1, "warmup_steps": 0}).code
        == 0
    )
    assert cli("generate/base.py", checkpoint_dir=llama, prompt="x", max_new_tokens=2, device="cpu").code == 0
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert (
        hardware.choose_device("mps") == torch.device("mps")
        and hardware.sum_dtype(torch.device("mps")) is torch.float32
    )
