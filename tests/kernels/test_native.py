"""The C++ kernels are compiled once, and where they cannot be, all goes on without them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.paths import ROOT

pytestmark = pytest.mark.subprocess

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
NORM = """
import torch
from lit_gpt.kernels import norms, ops
x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
print(ops.available(), norms.rms_norm(x, torch.ones(40), 1e-5).square().mean().item())
"""


def compute(cache: Path, **env: str) -> subprocess.CompletedProcess:
    env = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT), **env}
    return subprocess.run([sys.executable, "-c", NORM], env=env, capture_output=True, text=True, check=True)


def compiler(folder: Path, before: str) -> str:
    """Write a g++ that does something first, and leaves out what takes it most of its time."""
    path = folder / "compiler"
    path.write_text(f'#!/bin/sh\n{before}\nexec g++ "$@" -O0\n')
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_each_library_is_compiled_once(tmp_path):
    noting = compiler(tmp_path, f'case "$*" in *.cpp*) echo "$*" >> {tmp_path}/calls;; esac')
    first, second = (compute(tmp_path / "cache", CXX=noting) for _ in range(2))
    assert first.stdout == second.stdout and first.stdout.startswith("True 0.99")
    assert first.stderr == second.stderr == ""
    sources = [
        name for line in (tmp_path / "calls").read_text().splitlines() for name in line.split() if ".cpp" in name
    ]
    assert len(sources) == len(set(sources)) == len(list((tmp_path / "cache" / "lit_gpt").iterdir())) > 0


@pytest.mark.parametrize("broken", ["none", "failing", "folder"])
def test_without_them_the_formulas_serve(tmp_path, broken):
    env = {
        "none": {"PATH": "/nonexistent"},
        "failing": {"CXX": shutil.which("false")},
        "folder": {"CXX": shutil.which("true"), "XDG_CACHE_HOME": "/dev/null"},
    }[broken]
    result = compute(tmp_path, **env)
    assert result.stdout.startswith("False 0.99")
    (line,) = result.stderr.splitlines()
    assert "the CPU goes without the faster kernels" in line and ("g++" in line if broken == "none" else True)


@needs_compiler
def test_killed_while_it_compiles(tmp_path):
    slow = compiler(tmp_path, f'case "$*" in *.cpp*) touch {tmp_path}/begun; sleep 60;; esac')
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "CXX": slow}
    process = subprocess.Popen([sys.executable, "-c", NORM], env=env, start_new_session=True)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "lit_gpt").glob("*.so"))
    result = compute(tmp_path, CXX=compiler(tmp_path, ":"))
    assert result.stdout.startswith("True 0.99") and result.stderr == ""


@needs_compiler
def test_a_damaged_library_is_compiled_again(tmp_path):
    quick = compiler(tmp_path, ":")
    whole = compute(tmp_path, CXX=quick)
    for path in (tmp_path / "lit_gpt").iterdir():
        path.write_bytes(b"")
    result = compute(tmp_path, CXX=quick)
    assert (result.stdout, result.stderr) == (whole.stdout, "")
