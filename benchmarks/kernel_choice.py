"""What the choice of kernels is worth on this CPU: each operation of a training layer by our kernel and by torch's
operators, forward and backward, at the shapes of three models' layers.

    python benchmarks/kernel_choice.py

Both take turns in one process. The table says which of them a trial chooses here (lit_gpt/kernels/trials.py), and how
its time compares with the other's.
Writes kernel_choice_ISA.json and .md.
"""

import json
import time
from collections.abc import Callable, Iterator
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Literal

from lit_gpt.cli import PositiveInt, run

models: str = "smollm2-135m,tinyllama-1.1b,falcon-7b"  # whose layers
tokens: PositiveInt = 1024  # of a packed row of four samples
rounds: PositiveInt = 9  # in which both ways take turns
isa: Literal["native", "avx2"] = "native"  # instructions that may be used: this processor's, or a laptop's
out_dir: Path = Path("benchmarks/results")  # folder for the results

SAMPLES = 4  # of a row
RANK = 8
# heads, groups, head size, width, width within the MLP, whether that is gated
SHAPES = {
    "smollm2-135m": (9, 3, 64, 576, 1536, True),
    "tinyllama-1.1b": (32, 4, 64, 2048, 5632, True),
    "falcon-7b": (71, 1, 64, 4544, 18176, False),
}


def main() -> None:
    from peers.isa import limit

    limit(isa)
    import torch

    from lit_gpt.kernels.trials import chosen

    rows = []
    for model in models.split(","):
        for name in ("bf16", "fp32"):
            dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
            for operation, tried, call, inputs in operations(SHAPES[model], dtype):
                found = compare(call, inputs, chosen(tried[0], dtype, *tried[1:]))
                rows.append({"model": model, "precision": name, "operation": operation} | found)
                print(line(rows[-1]), flush=True)
    report(rows)


def operations(shape: tuple[int, int, int, int, int, bool], dtype: Any) -> Iterator[tuple[str, tuple, Callable, list]]:
    """Yield each operation's name, what its trial is called by, its function and its tensors, which want gradients."""
    import torch

    from lit_gpt.kernels.attention import ScoreParams, attention
    from lit_gpt.kernels.functional import ACTIVATIONS, gated, low_rank_update, rotate
    from lit_gpt.kernels.norms import rms_norm

    heads, groups, size, width, inner, is_gated = shape
    every = (heads + 2 * groups) * size

    def made(*sizes: int, dtype: Any = dtype) -> Any:
        return torch.randn(*sizes, dtype=dtype).mul_(0.5).requires_grad_()

    def lora(out: int, parts: list[tuple[int, int]]) -> Callable:
        A, B = made(len(parts) * RANK, width, dtype=torch.float32), made(out, RANK, dtype=torch.float32)
        # the update is added in place to what the frozen layer made
        return lambda x: low_rank_update(torch.zeros(tokens, out, dtype=dtype), x, A, B, parts, 2.0, 0.05, keys)

    edges, keys = [0, heads * size, (heads + groups) * size, every], torch.arange(tokens)
    parts, tried = [*pairwise(edges)], ("LoRA", width, every, 3, RANK, 1)
    yield "LoRA on query, key, value", tried, lora(every, parts), [made(tokens, width)]
    tried = "LoRA", width, inner, 1, RANK, 1
    yield "LoRA into the MLP", tried, lora(inner, [(0, inner)]), [made(tokens, width)]
    if is_gated:
        norm = torch.ones(width, dtype=dtype)
        yield "RMSNorm", ("RMSNorm", width), lambda x: rms_norm(x, norm, 1e-5), [made(tokens, width)]
        tried = "gated silu", 2 * inner
        yield "gated SiLU", tried, lambda x: gated(x, ACTIVATIONS["silu"]), [made(tokens, 2 * inner)]
    angles = [torch.rand(tokens, size, dtype=torch.float32).to(dtype) for _ in range(2)]
    tried = "rotary", every, heads + groups, size, size
    yield "rotary", tried, lambda x: rotate(x, *angles, heads + groups, size), [made(1, tokens, every)]
    lengths = (tokens // SAMPLES,) * SAMPLES
    qkv = [made(1, n, tokens, size) for n in (heads, groups, groups)]
    tried = "attention", size, heads // groups
    yield "attention", tried, lambda q, k, v: attention(q, k, v, ScoreParams(size**-0.5), lengths), qkv


def compare(call: Callable, inputs: list, ours_chosen: bool) -> dict[str, Any]:
    """Return the seconds of a forward and backward pass by our kernel and by torch's operators, and who is chosen."""
    from lit_gpt.kernels.policy import use_policy

    def passes(fused: bool) -> float:
        with use_policy(fused=fused):
            start = time.perf_counter()
            call(*inputs).sum().backward()
            return time.perf_counter() - start

    turns = [(passes(True), passes(False)) for _ in range(rounds + 1)][1:]
    ours, theirs = (median(turn[i] for turn in turns) for i in (0, 1))
    ratios = sorted((b / a if ours_chosen else a / b) for a, b in turns)
    return {"kernel": ours, "torch": theirs, "chosen": "kernel" if ours_chosen else "torch", "other": median(ratios)}


def line(r: dict[str, Any]) -> str:
    times = f"{1000 * r['kernel']:.2f} | {1000 * r['torch']:.2f} | {r['chosen']} | {r['other']:.2f}"
    return f"| {r['model']} | {r['precision']} | {r['operation']} | {times} |"


def report(rows: list[dict[str, Any]]) -> None:
    import torch
    from peers.isa import suffix
    from peers.report import command, machine

    here = machine(torch.get_num_threads())
    contents = {"command": command("kernel_choice"), "date": date.today().isoformat(), "torch": torch.__version__}
    stem = out_dir / f"kernel_choice{suffix(isa)}"
    out_dir.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(contents | {"machine": here, "rows": rows}, indent=2) + "\n")
    where = f"{here['cores']} cores of {here['cpu']} ({', '.join(here['extensions'])}), threads {here['threads']}"
    head = "| layer of | precision | operation | our kernel, ms | torch, ms | chosen | the other's time over its |"
    page = [
        "# Kernels of a training layer beside torch's operators", f"`{contents['command']}`",
        f"{where}; torch {contents['torch']}; {contents['date']}.",
        "\n".join([head, "|---|---|---|---:|---:|---|---:|", *map(line, rows)]),
        f"Forward and backward pass of {tokens} tokens, medians of {rounds} turns.",
    ]  # fmt: skip
    stem.with_suffix(".md").write_text("\n\n".join(page) + "\n")


if __name__ == "__main__":
    run(main)
