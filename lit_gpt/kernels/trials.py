"""Whether a kernel is faster than torch's operators on this machine, found by a short trial when it is first asked for.

A trial computes an operation in both ways by turns, forward and backward, at the sizes of the layer that asks, on one
thread, and compares the time that this works: whatever else the machine does meanwhile makes it wait, and several
threads for each other, a hundred times as long. What it finds is kept beside the compiled libraries, in a file for each
processor, set of instructions, torch and state of the libraries: a choice once made stays, so that a run which is
resumed goes on to the bit.

LIT_GPT_TRIALS=0 goes without trials, by a rule: kernels serve where the CPU has vectors of 256 bits or more. A policy
that says `fused` or `onednn` goes before both.
"""

import fcntl
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import Context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt.files import atomic
from lit_gpt.kernels import build
from lit_gpt.kernels.policy import WIDE_VECTORS, policy, use_policy

TURNS = 5, 12  # of both ways, at least and at most; the first is not counted, and of the others the fastest tells
ENOUGH = 0.04  # seconds, after which a trial ends that has had its least turns
IN_DOUBT = 1.2  # times torch's time are a kernel's still: torch's many calls weigh more in rows shorter than a trial's
ELEMENTS = 2**21  # of a trial's larger tensors: no cache of a core has them, as none has a training row's
LIMITS = ("ATEN_CPU_CAPABILITY", "LIT_GPT_MARCH", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")  # on instructions

Times = dict[str, float]  # seconds of work of a pass by "kernel" and "torch"
Sample = Callable[[], Any]  # computes an operation once
_samples: dict[str, tuple[str, Callable[..., Sample]]] = {}
_times: dict[str, Times] = {}
_trying = threading.RLock()


def sampled(operation: str, field: str = "fused") -> Callable[[Callable[..., Sample]], Callable[..., Sample]]:
    """Register what makes an operation's Sample, of a dtype and its sizes.

    Args:
        field: the field of the policy that says which way it is computed.
    """

    def register(make: Callable[..., Sample]) -> Callable[..., Sample]:
        _samples[operation] = field, make
        return make

    return register


def chosen(operation: str, dtype: torch.dtype, *sizes: int) -> bool:
    """Return whether the kernel is to serve: by the policy, else by trial."""
    said: bool | None = getattr(policy(), _samples[operation][0])
    return faster(operation, dtype, *sizes) if said is None else said


def faster(operation: str, dtype: torch.dtype, *sizes: int) -> bool:
    """Return whether the kernel is not clearly slower here at these sizes; it is tried when that is not known."""
    if os.environ.get("LIT_GPT_TRIALS") == "0":
        return WIDE_VECTORS
    label = " ".join(map(str, (operation, *sizes, str(dtype).removeprefix("torch."))))
    if label not in _times:
        with _trying:
            _times[label] = _kept(label, lambda: _in_thread(operation, dtype, sizes))
    return _wins(label)


def _wins(label: str) -> bool:
    field = next(field for operation, (field, _) in _samples.items() if label.startswith(operation))
    return _times[label]["kernel"] <= (IN_DOUBT if field == "fused" else 1) * _times[label]["torch"]


def describe() -> Iterator[str]:
    """Yield a line on each choice by trial that this process has asked for."""
    for label, times in _times.items():
        by = "kernel" if _wins(label) else "torch"
        yield f"{label}: {by} (kernel {1000 * times['kernel']:.2f} ms, torch {1000 * times['torch']:.2f} ms)"


def ramp(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor of numbers from -1 to 1: random ones would move the generator on, and with it a run."""
    count = functools.reduce(int.__mul__, sizes)
    return torch.linspace(-1, 1, count).view(sizes).to(dtype).requires_grad_()


def both_passes(call: Callable[..., Tensor], *inputs: Tensor) -> Sample:
    """Return what computes a function of tensors and then their gradients."""

    def run() -> None:
        y = call(*inputs)
        torch.autograd.grad(y, inputs, y.detach())

    return run


def row_count(size: int) -> int:
    """Return how many rows of a size a trial takes."""
    return min(1024, max(16, ELEMENTS // size))


def _in_thread(*asked: Any) -> Times:
    """Try in a thread of its own, which knows no mode, autocast nor policy of who asks; a plan's tensors are fake."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return pool.submit(Context().run, _try, *asked).result()
    finally:
        torch.set_num_threads(threads)


def _try(operation: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> Times:
    field, make = _samples[operation]
    run = make(dtype, *sizes)
    spent: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(1, TURNS[1] + 1):
        for way, times in spent.items():
            with use_policy(**{field: way}):
                start = time.thread_time()
                run()
                times.append(time.thread_time() - start)
        if turn >= TURNS[0] and sum(map(sum, spent.values())) > ENOUGH:
            break
    return {"kernel": min(spent[True][1:]), "torch": min(spent[False][1:])}


def _kept(label: str, attempt: Callable[[], Times]) -> Times:
    """Return what is in the file about a trial, or make it and add it there; the first of two processes decides."""
    machine, times = _machine(), None
    try:
        path = build.cache_folder() / f"trials-{build.digest(json.dumps(machine).encode())}.json"
        if label in (known := _read(path, machine)):
            return known[label]
        times = attempt()
        with _alone(path.parent):
            known = {label: times} | _read(path, machine)
            with atomic(path) as temporary:
                temporary.write_text(json.dumps({"machine": machine, "trials": known}, indent=1) + "\n")
        return known[label]
    except OSError as error:
        _tell(f"{error.filename}: {error.strerror}; each process tries anew which kernels are faster here")
        return times or attempt()


@functools.cache
def _machine() -> dict[str, Any]:
    """Return what a trial's outcome depends on, besides its label."""
    compiler = build.find_compiler()
    return {
        "processor": build.processor("model name", "CPU part"), "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "limits": {name: os.environ[name] for name in LIMITS if name in os.environ},
        "libraries": [build.fingerprint(compiler, name) for name in build.OPERATORS] if compiler else [],
    }  # fmt: skip


def _read(path: Path, machine: dict[str, Any]) -> dict[str, Times]:
    """Return the trials in a file; none if it is missing, damaged or another machine's."""
    try:
        contents = json.loads(path.read_text())
        trials = {
            label: {way: float(times[way]) for way in ("kernel", "torch")}
            for label, times in contents["trials"].items()
        }
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return trials if contents["machine"] == machine else {}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from changing files in a folder meanwhile."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # of a file system that has no locks
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


@functools.cache
def _tell(message: str) -> None:
    print(message, file=sys.stderr)
