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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lit_gpt.cli import PositiveInt, run, tune_torch
from lit_gpt.errors import UsageError
from lit_gpt.files import write_json

model: str = "falcon-7b"  # Measure speed and memory on random weights of this size.
out_dir: Path = Path("out/gpu_check")  # Write gpu_check.json and the profiler's trace to this folder.
seconds: PositiveInt = 510  # Begin no section after this time.
dry_run: bool = False  # Run on tiny shapes on the CPU.

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "triton", "lightning", "lightning-fabric", "transformers", "peft", "jsonargparse", "bitsandbytes")
METHODS = ("lora", "adapter", "adapter_v2", "full")
TINY = {"n_layer": 3, "n_embd": 128, "n_head": 8, "head_size": 16, "intermediate_size": 256, "padded_vocab_size": 320}


@dataclass
class Check:
    """Holds what the sections share and what they found.

    Attributes:
        device: "cuda", or "cpu" in a dry run.
        failures: what must agree and did not, or ended in an error.
    """

    device: str
    folder: Path
    results: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def dry(self) -> bool:
        return self.device == "cpu"

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            self.failures.append(what)
            print(f"  WRONG: {what}", flush=True)

    def write(self) -> None:
        write_json(self.folder / "gpu_check.json", {"results": self.results, "failures": self.failures})


def main() -> None:
    if dry_run:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # which is read when Triton is imported
    import torch

    if not dry_run and not torch.cuda.is_available():
        raise UsageError("this machine has no CUDA device; --dry_run true runs every section on its CPU")
    tune_torch()
    out_dir.mkdir(parents=True, exist_ok=True)
    check, start = Check("cpu" if dry_run else "cuda", out_dir), time.monotonic()
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


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(action: Callable[[], Any], repeats: int) -> float:
    """Return the seconds of one of `repeats` calls, on the mean, after one that does not count."""
    action()
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        action()
    synchronize()
    return (time.perf_counter() - start) / repeats


def distance(a: Any, b: Any) -> float:
    """Return the distance of two tensors relative to the second's norm, float64 on the CPU."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


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


def attached(gpt: Any, name: str, **settings: Any) -> Any:
    """Attach a method, with its own defaults but for `settings` that it has."""
    from lit_gpt.methods import registry

    config = registry.config_class(name)()
    known = {key: value for key, value in settings.items() if hasattr(config, key)}
    return registry.make_method(name, replace(config, **known)).attach(gpt)


def packed_row(lengths: list[int], vocabulary: int, seed: int = 0) -> Any:
    """Return samples of random tokens, their last halves supervised, packed into one row."""
    import torch

    from lit_gpt.data.dataset import Sample
    from lit_gpt.data.packing import pack

    generator, samples = torch.Generator().manual_seed(seed), []
    for n in lengths:
        tokens = torch.randint(vocabulary, (n,), generator=generator, dtype=torch.int32)
        samples.append(Sample(tokens, (torch.arange(n) >= n // 2).to(torch.uint8)))
    return pack(samples)


def random_gpt(check: Check, format: str | None = None) -> Any:
    """Make the model on the device in bfloat16, of normal weights with a standard deviation of 0.02."""
    import torch

    from lit_gpt import GPT, config_from_name
    from lit_gpt.model.gpt import quantize

    config = config_from_name(model)
    if check.dry:
        groups = 1 if config.n_query_groups == 1 else 2
        config = replace(config, **TINY, vocab_size=320, n_query_groups=groups, block_size=512)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(check.device):
            gpt = GPT(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in gpt.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
    return quantize(gpt, format) if format else gpt


def training(check: Check) -> dict[str, Any]:
    """Train by each method on rows like Alpaca's: tokens per second and peak memory, beside what was planned."""
    import torch

    runs = {"lora": ("lora", None), "lora nf4": ("lora", "nf4"), "adapter": ("adapter", None)}
    runs |= {"adapter_v2": ("adapter_v2", None), "lora int8": ("lora", "int8")}
    result: dict[str, Any] = {}
    for name, (method, format) in runs.items():
        for tokens in (256,) if check.dry else (1024, 4096, 16384):
            row = f"{name}, row of {tokens}"
            try:
                result[row] = train(check, method, format, tokens)
            except torch.OutOfMemoryError:
                result[row] = "out of memory"
                torch.cuda.empty_cache()
            print(f"  {row}: {result[row]}", flush=True)
    return result


def train(check: Check, method: str, format: str | None, tokens: int) -> dict[str, float]:
    """Take steps of one row; return tokens per second and peak memory in GB."""
    import torch

    gpt = attached(random_gpt(check, format), method).train()
    trained = [p for p in gpt.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=not check.dry)
    row = packed_row([108] * (tokens // 108), 320 if check.dry else 65024).to(torch.device(check.device))

    def step() -> None:
        gpt(row.idx, segments=row.segments, targets=row.targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    if not check.dry:
        torch.cuda.reset_peak_memory_stats()
        with no_synchronization():
            step()
    took = timed(step, 1 if check.dry else 3)
    peak = 0.0 if check.dry else torch.cuda.max_memory_allocated() / 1e9
    return {"tokens/s": round(row.idx.numel() / took, 1), "peak GB": round(peak, 2)}


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Let what makes the host wait for the device raise an error."""
    import torch

    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def profile(check: Check) -> dict[str, Any]:
    """Profile one LoRA step: the kernels that take longest, and a trace that Perfetto opens."""
    import torch
    from torch.profiler import ProfilerActivity

    gpt = attached(random_gpt(check), "lora").train()
    row = packed_row([108] * 2 if check.dry else [108] * 37, 320).to(torch.device(check.device))

    def step() -> None:
        gpt(row.idx, segments=row.segments, targets=row.targets).backward()

    step()
    activities = [ProfilerActivity.CPU] + ([] if check.dry else [ProfilerActivity.CUDA])
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        synchronize()
    profiler.export_chrome_trace(str(check.folder / "trace.json.gz"))
    key = "self_cpu_time_total" if check.dry else "self_device_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: getattr(event, key), reverse=True)[:40]
    return {event.key[:100]: round(getattr(event, key)) for event in events}


def decoding(check: Check) -> dict[str, Any]:
    """Compare and time products in every format, and the captured step, see gpu_decoding.py."""
    import gpu_decoding

    return gpu_decoding.decoding(check)


def peers(check: Check) -> dict[str, Any]:
    """Train and generate by PEFT over transformers, on as many random weights and tokens."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from lit_gpt.families import registry

    sizes = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 8, "vocab_size": 320}
    config = AutoConfig.for_model(**(registry.preset(model) | (sizes if check.dry else {})))
    with torch.device(check.device):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        prompt = torch.arange(1, 33).unsqueeze(0)
    tokens, given = (8 if check.dry else 64), {"attention_mask": torch.ones_like(prompt), "do_sample": False}
    given |= {"max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
    result = {"transformers generate tokens/s": round(tokens / timed(lambda: base.generate(prompt, **given), 1), 1)}
    theirs = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["query_key_value"]))
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-4)
    rows = torch.randint(320, (2 if check.dry else 37, 108), device=check.device)

    def step() -> None:
        theirs(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return result | {"PEFT LoRA tokens/s": round(rows.numel() / timed(step, 1 if check.dry else 3), 1)}


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
