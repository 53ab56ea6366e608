"""Kernels serve where a trial on this machine finds them faster; what it found is kept, and stays."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from helpers.paths import ROOT
from lit_gpt.kernels import attention, convolution, linear, norms, ops, trials  # noqa: F401 (each registers its trials)
from lit_gpt.kernels.policy import WIDE_VECTORS, KernelPolicy, use_policy
from lit_gpt.model import loss  # noqa: F401

needs_kernels = pytest.mark.skipif(not ops.available(), reason="no C++ compiler")
SIZES = {
    "LoRA": (32, 48, 3, 8, 1), "attention": (16, 3), "convolution": (24, 4), "cross-entropy": (100,),
    "gated gelu_tanh": (64,), "gated silu": (64,), "product": (), "RMSNorm": (40,), "rotary": (96, 4, 16, 16),
}  # fmt: skip
ASK = """
from lit_gpt.kernels import norms, trials
print([trials.faster("RMSNorm", __import__("torch").float32, size) for size in range(64, 512, 64)], trials._times)
"""


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Let trials be made and kept in an empty folder."""
    monkeypatch.setenv("LIT_GPT_TRIALS", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(trials, "_times", {})
    with use_policy(**vars(KernelPolicy())):
        yield tmp_path / "lit_gpt"


@pytest.fixture
def tried(cache, monkeypatch) -> list[str]:
    """Return the operations that are tried, of which kernels win in float32 and lose in bfloat16."""
    asked: list[str] = []

    def attempt(operation, dtype, sizes):
        asked.append(operation)
        return {"kernel": 2.0, "torch": 3.0 if dtype == torch.float32 else 1.0}

    monkeypatch.setattr(trials, "_try", attempt)
    return asked


def forget() -> None:
    """Be as a new process."""
    trials._times.clear()


def test_the_faster_one_is_chosen_once_and_for_all(cache, tried):
    for _ in range(2):
        for _ in range(2):
            assert trials.chosen("RMSNorm", torch.float32, 64)
            assert not trials.chosen("RMSNorm", torch.bfloat16, 64)
        forget()
    assert tried == ["RMSNorm"] * 2
    (path,) = cache.iterdir()
    assert len(json.loads(path.read_text())["trials"]) == 2


def test_in_doubt_a_kernel_serves_but_of_two_libraries_the_faster(tried, monkeypatch):
    monkeypatch.setattr(trials, "_try", lambda *_: {"kernel": 1.1, "torch": 1.0})
    assert trials.chosen("RMSNorm", torch.float32, 64) and not trials.chosen("product", torch.float32)
    assert [line.split(": ")[1].split()[0] for line in trials.describe()] == ["kernel", "torch"]


def test_other_sizes_are_tried_apart_and_added(cache, tried):
    assert trials.chosen("RMSNorm", torch.float32, 64) and trials.chosen("RMSNorm", torch.float32, 128)
    forget()
    assert trials.chosen("RMSNorm", torch.float32, 64) and trials.chosen("RMSNorm", torch.float32, 128)
    assert len(tried) == 2


def test_the_policy_goes_before_a_trial(tried):
    with use_policy(fused=True, onednn=False):
        assert trials.chosen("RMSNorm", torch.bfloat16, 64) and not trials.chosen("product", torch.float32)
    with use_policy(fused=False):
        assert not trials.chosen("RMSNorm", torch.float32, 64)
    assert not tried


@needs_kernels
@pytest.mark.parametrize("compile", ["auto", "true", "false"])
def test_a_run_tries_unless_it_is_told(cli, tried, llama, data_dir, tmp_path, compile):
    flags = dict(checkpoint_dir=llama, data_dir=data_dir, out_dir=tmp_path / "run", max_steps=1, compile=compile)
    result = cli("finetune/lora.py", **flags, batch_size=1, micro_batch_tokens=64, sample_tokens=0, precision="fp32")
    assert result.code == 0, result.err
    assert ("RMSNorm" in tried) == (compile == "auto")


def test_without_trials_a_rule_says_it(tried, monkeypatch):
    monkeypatch.setenv("LIT_GPT_TRIALS", "0")
    assert trials.chosen("RMSNorm", torch.float32, 64) == WIDE_VECTORS
    assert not tried


@pytest.mark.parametrize(
    "contents",
    [b"", b"\xff\xfe", b"[]", b'{"trials": {', b'{"machine": {"processor": "another"}, "trials": {}}', b"[" * 9999],
)
def test_a_damaged_or_foreign_file_is_made_anew(cache, tried, contents):
    trials.chosen("RMSNorm", torch.float32, 64)
    (path,) = cache.iterdir()
    good = path.read_bytes()
    for bad in (contents, good[: len(good) // 2], good.replace(b'"kernel"', b'"kernels"')):
        path.write_bytes(bad)
        forget()
        assert trials.chosen("RMSNorm", torch.float32, 64)
        assert path.read_bytes() == good
    assert len(tried) == 4


def test_where_nothing_can_be_written_it_is_said_once_and_tried_each_time(tried, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    trials._tell.cache_clear()
    for size in (64, 128):
        assert trials.chosen("RMSNorm", torch.float32, size)
    forget()
    assert trials.chosen("RMSNorm", torch.float32, 64)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("/dev/null/lit_gpt: ") and len(tried) == 3


@pytest.mark.subprocess
@needs_kernels
def test_two_processes_at_once_agree(tmp_path):
    env = os.environ | {"LIT_GPT_TRIALS": "1", "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", ASK]
    both = [subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (process.communicate()[0] for process in both)
    assert first == second and "RMSNorm 448 float32" in first


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", trials._samples)
def test_each_operation_is_tried_whatever_asks(cache, operation, dtype):
    """A plan asks with tensors that have no contents; nothing that a run computes by is moved."""
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    with FakeTensorMode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        trials.chosen(operation, dtype, *SIZES[operation])
    (times,) = trials._times.values()
    assert times["kernel"] > 0 and times["torch"] > 0
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads


@needs_kernels
def test_a_plan_lists_what_was_chosen(cli, cache, tried):
    result = cli("scripts/plan.py", model="pythia-14m", device="cpu", max_seq_length=64, micro_batch_tokens=64)
    assert result.code == 0 and "chosen by trial on this machine:\n  " in result.out, result.err
    assert "rotary" in result.out and "torch (kernel 2000.00 ms, torch 1000.00 ms)" in result.out
