"""Prove the CUDA path on one GPU within nine minutes: numbers that must agree, then speed and memory.

    python benchmarks/gpu_check.py --out_dir benchmarks/results/gpu_check
    python benchmarks/gpu_check.py --dry_run true

Every section has a deadline of its own and may fail by itself; gpu_check.json is written anew after each, a table comes
last. With --dry_run the same sections run on tiny shapes on the CPU, so that no typing error is left for the GPU.
Weights are random and made on the device: nothing is downloaded.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu_common import Check, attached, distance, packed_row, timed

from lit_gpt.cli import PositiveInt, run, tune_torch
from lit_gpt.errors import UsageError

model: str = "falcon-7b"  # Measure speed and memory on random weights of this size.
out_dir: Path = Path("out/gpu_check")  # Write gpu_check.json and the profiler's trace to this folder.
seconds: PositiveInt = 510  # Begin no section after this time.
dry_run: bool = False  # Run on tiny shapes on the CPU.

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "triton", "lightning", "lightning-fabric", "transformers", "peft", "jsonargparse", "bitsandbytes")
METHODS = ("lora", "adapter", "adapter_v2", "full")


def main() -> None:
    if dry_run:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # which is read when Triton is imported
    import torch

    if not dry_run and not torch.cuda.is_available():
        raise UsageError("this machine has no CUDA device; --dry_run true runs every section on its CPU")
    tune_torch()
    out_dir.mkdir(parents=True, exist_ok=True)
    check, start = Check("cpu" if dry_run else "cuda", out_dir, model), time.monotonic()
    for section, limit in SECTIONS.items():
        name = section.__name__
        if time.monotonic() - start > seconds:
            check.failures.append(f"{name}: not begun, the time was up")
            continue
        began = time.monotonic()
        print(f"{name} (at {began - start:.0f} s)", flush=True)
        try:
            with deadline(4 * limit if dry_run else limit):
                check.results[name] = section(check)
        except Exception as error:  # one section must not take the others along
            traceback.print_exc()
            check.failures.append(f"{name}: {type(error).__name__}: {error}")
        check.results.setdefault(name, {})
        check.results[name]["seconds"] = round(time.monotonic() - began, 1)
        check.write()
    print_table(check)
    raise SystemExit(1 if check.failures else 0)


@contextmanager
def deadline(limit: int) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds."""

    def expire(*_: Any) -> None:
        raise TimeoutError(f"more than {limit} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def machine(check: Check) -> dict[str, Any]:
    """Name the device and the versions; measure copies, and products at Falcon-7B's shapes."""
    import torch

    result: dict[str, Any] = {"python": sys.version.split()[0], "date": time.strftime("%Y-%m-%d")}
    for name in PACKAGES:
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            result[name] = "not installed"
    if not check.dry:
        result |= {"device": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version()}
    n, tokens, shapes = (2**20, 64, [(64, 64)]) if check.dry else (2**30, 4096, [(4672, 4544), (18176, 4544)])
    source = torch.empty(n, dtype=torch.uint8, device=check.device)
    into = torch.empty_like(source)
    result["copy GB/s"] = round(2 * n / timed(lambda: into.copy_(source), 10) / 1e9, 1)
    for rows, columns in shapes:
        x = torch.randn(tokens, columns, device=check.device, dtype=torch.bfloat16)
        w = torch.randn(rows, columns, device=check.device, dtype=torch.bfloat16)
        took = timed(lambda x=x, w=w: x @ w.t(), 20)
        result[f"TFLOP/s {tokens}x{columns}x{rows}"] = round(2 * tokens * rows * columns / took / 1e12, 2)
    return result


def kernels(check: Check) -> dict[str, Any]:
    """Compare every kernel with the plain formula, see gpu_kernels.py."""
    import gpu_kernels

    return gpu_kernels.kernels(check)


def families(check: Check) -> dict[str, Any]:
    """Compare loss and gradients of every family's tiny layout with the CPU's in float32, for each method."""
    import torch
    from transformers import AutoModelForCausalLM

    from lit_gpt.checkpoints.base_model import load_model
    from lit_gpt.conversion import hf, hf_shards
    from lit_gpt.families import registry

    layouts = [(family, name) for family in registry.families() for name in family.tiny_hf()]
    worst: dict[str, float] = {}
    for family, name in layouts[:2] if check.dry else layouts:
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(family.tiny_hf()[name]).save_pretrained(folder)
            hf.convert(Path(folder), hf_shards.StoredWeights(Path(folder)))
            for method in METHODS:
                exact = loss_and_gradients(load_model(Path(folder)), method, "cpu", torch.float32)
                for dtype, bound in ((torch.float32, 1e-3), (torch.bfloat16, 0.1)):
                    given = loss_and_gradients(load_model(Path(folder)), method, check.device, dtype)
                    off = max(distance(a, b) for a, b in zip(given, exact, strict=True))
                    key = f"{method} {str(dtype).removeprefix('torch.')}"
                    worst[key] = max(worst.get(key, 0.0), off)
                    check.require(off < bound, f"{name}, {key}: gradients differ from the CPU's by {off:.3g}")
    return {"layouts": len(layouts), **{key: float(f"{value:.3g}") for key, value in worst.items()}}


def loss_and_gradients(gpt: Any, method_name: str, device: str, dtype: Any) -> list[Any]:
    """Return the loss on a packed row of three samples, and all gradients as one vector."""
    import torch

    torch.manual_seed(1)
    gpt = attached(gpt.to(dtype), method_name, dropout=0.0, start_layer=1).to(device).train()
    for _, parameter in sorted(gpt.named_parameters()):
        if parameter.requires_grad and method_name != "full":  # what is new is zero, and would pass on no gradient
            parameter.data.add_(0.1 * torch.randn(parameter.shape).to(device, parameter.dtype))
    row = packed_row([9, 31, 5], 96).to(torch.device(device))
    loss = gpt(row.idx, segments=row.segments, targets=row.targets)
    loss.backward()
    gradients = [p.grad.flatten().float() for _, p in sorted(gpt.named_parameters()) if p.grad is not None]
    return [loss, torch.cat(gradients)]


def training(check: Check) -> dict[str, Any]:
    """Train by each method on rows like Alpaca's, see gpu_training.py."""
    import gpu_training

    return gpu_training.training(check)


def profile(check: Check) -> dict[str, Any]:
    """Profile one LoRA step, see gpu_training.py."""
    import gpu_training

    return gpu_training.profile(check)


def peers(check: Check) -> dict[str, Any]:
    """Train and generate by PEFT over transformers, see gpu_training.py."""
    import gpu_training

    return gpu_training.peers(check)


def decoding(check: Check) -> dict[str, Any]:
    """Compare and time products in every format, and the captured step, see gpu_decoding.py."""
    import gpu_decoding

    return gpu_decoding.decoding(check)


def scripts(check: Check) -> dict[str, Any]:
    """Run the real scripts on a tiny checkpoint: each activation checkpointing, stop and resume, generate, merge."""
    from peers.environment import random_model

    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 8, "vocab_size": 320}
        checkpoint_dir, data_dir = random_model("falcon-7b", sizes, 64, 1337, Path(folder))
        base = [f"--checkpoint_dir={checkpoint_dir}"]
        train = [*base, f"--data_dir={data_dir}", "--batch_size=8", "--warmup_steps=0", "--eval_samples=4"]
        kinds = ("none", "full") if check.dry else ("none", "selective", "full", "offload")
        commands = {
            f"lora {kind}": ["finetune/lora.py", *train, f"--activation_checkpointing={kind}", "--max_steps=3"]
            for kind in kinds
        }
        commands = {name: [*argv, f"--out_dir={folder}/{name.replace(' ', '_')}"] for name, argv in commands.items()}
        for method in METHODS[1:]:
            flags = ["--max_steps=3", f"--out_dir={folder}/{method}"]
            flags += ["--adapter_start_layer=1"] if "adapter" in method else []
            commands[method] = [f"finetune/{method}.py", *train, *flags]
        lora_path = f"--lora_path={folder}/lora_none/lit_model_lora_finetuned.pth"
        commands["generate"] = ["generate/lora.py", *base, lora_path, "--prompt=<end>", "--max_new_tokens=8"]
        commands["merge"] = ["scripts/merge_lora.py", *base, lora_path, f"--out_dir={folder}/merged"]
        for name, argv in commands.items():
            done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=100)
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            result[name] = "done" if done.returncode == 0 else f"exit {done.returncode}: {' '.join(last)}"
            check.require(done.returncode == 0, f"{name}: {result[name]}")
    return result


# what must agree comes first; seconds that each may take
SECTIONS = {
    machine: 30, kernels: 60, families: 100, scripts: 120, training: 150, decoding: 100, peers: 60, profile: 30,
}  # fmt: skip


def print_table(check: Check) -> None:
    for section, figures in check.results.items():
        print(f"\n{section}")
        for name, value in figures.items():
            print(f"  {name:<44} {value}")
    print(f"\n{len(check.failures)} failures")
    for failure in check.failures:
        print(f"  {failure}")


if __name__ == "__main__":
    run(main)
