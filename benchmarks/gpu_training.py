"""Speed and memory of training: the sections of gpu_check.py on steps by each method, one step's kernels, and PEFT."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gpu_common import Check, attached, packed_row, random_gpt, synchronize, timed


def training(check: Check) -> dict[str, Any]:
    """Train by each method on rows like Alpaca's: tokens per second and peak memory, beside what was planned."""
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
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def profile(check: Check) -> dict[str, Any]:
    """Profile one LoRA step: the kernels that take longest, and a trace that Perfetto opens."""
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


def peers(check: Check) -> dict[str, Any]:
    """Train and generate by PEFT over transformers, on as many random weights and tokens."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from lit_gpt.families import registry

    sizes = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 8, "vocab_size": 320}
    config = AutoConfig.for_model(**(registry.preset(check.model) | (sizes if check.dry else {})))
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
