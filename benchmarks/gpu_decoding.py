"""Decoding on one GPU: the section of gpu_check.py on products with weights in every format, and on the captured step.

First numbers that must agree: products with float64, greedy tokens of the captured step with the plain loop's. Then
bytes and tokens per second. A dry run takes Triton's interpreter, and captures nothing.
"""

import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from gpu_common import Check, distance, random_gpt, synchronize, timed
from torch import Tensor

from lit_gpt import GPT, Config, config_from_name
from lit_gpt.generation.engine import decode, generate
from lit_gpt.generation.sampling import GREEDY
from lit_gpt.generation.sequence import DecodingRow, Step, eager_step
from lit_gpt.generation.steps import FastStep
from lit_gpt.generation.steps.compiled import CompiledStep
from lit_gpt.generation.steps.graph import GraphStep
from lit_gpt.kernels.cuda import gemv as products
from lit_gpt.kernels.cuda.decoding import attention
from lit_gpt.kernels.cuda.dequantize import QuantizedWeight, dequantize
from lit_gpt.kernels.cuda.gemv import Epilogue, gemv
from lit_gpt.kernels.policy import use_policy
from lit_gpt.model.gpt import quantize
from lit_gpt.quantization import formats

FORMATS = (None, *formats.FORMATS)


def decoding(check: Check) -> dict[str, Any]:
    """Compare and time products of every format and the captured step; see this file's head."""
    if check.dry:  # for the interpreter what costs is the number of programs
        products.PROGRAMS = attention.PROGRAMS = 1
    with use_policy(simulate_cuda=True) if check.dry else nullcontext():
        return multiplied(check) | agreeing(check) | timed_answers(check)


def multiplied(check: Check) -> dict[str, Any]:
    """Compare products of one row and of eight with float64, and on a GPU tell how fast they read the weight."""
    rows, columns = (48, 192) if check.dry else (18176, 4544)
    full, result = torch.randn(rows, columns).bfloat16(), {}
    for name in FORMATS:
        weight, exact = full.to(check.device), full.double()
        if name is not None:
            weight, exact = quantized(full, name, check.device)
            made = dequantize(weight, torch.bfloat16)
            off = distance(made, exact)
            check.require(off < 4e-3, f"{name}: the dequantized weight is off by {off:.3g}")
            if not check.dry:
                took = timed(lambda w=weight: dequantize(w, torch.bfloat16), 20)
                result[f"{name} dequantized, GB/s"] = round((nbytes(weight) + made.nbytes) / took / 1e9)
        for m in (1, 8):
            x = torch.randn(m, columns).to(check.device)
            expected = torch.nn.functional.gelu(x.double().cpu() @ exact.t())
            epilogue = Epilogue(activation="gelu")
            off = distance(gemv(x, weight, epilogue, dtype=torch.bfloat16), expected)
            check.require(off < (1e-5 if m == 1 else 8e-3), f"{name or 'bf16'}, {m} rows: off by {off:.3g}")
            if not check.dry:
                took = timed(lambda x=x, w=weight, e=epilogue: gemv(x, w, e, dtype=torch.bfloat16), 100)
                result[f"{name or 'bf16'}, {m} rows, GB/s"] = round(nbytes(weight) / took / 1e9)
    return result


def quantized(weight: Tensor, name: str, device: str) -> tuple[QuantizedWeight, Tensor]:
    """Return a weight as kernels read it, and what it stands for, float64 on the CPU."""
    tensors = formats.encode(weight, name, torch.bfloat16)
    with use_policy(triton=False):
        exact = formats.decode(tensors, name, weight.size(1), torch.float32).double()
    on_device = {key: tensor.to(device) for key, tensor in tensors.items()}
    return formats.FORMATS[name].for_cuda(on_device, weight.size(1)), exact


def nbytes(weight: Tensor | QuantizedWeight) -> int:
    parts = weight[:-1] if isinstance(weight, QuantizedWeight) else [weight]
    return sum(part.nbytes for part in parts if part is not None)


def agreeing(check: Check) -> dict[str, Any]:
    """Require that the captured step gives the greedy tokens of the plain loop, in float32, of rows of any length."""
    result = {}
    for family in ("falcon-7b", "Llama-2-7b"):
        for name in (None, "nf4") if check.dry else FORMATS:
            gpt = tiny(config_from_name(family), name).to(check.device).eval()
            prompts, new = [[5, 6, 7], [9] * 40, [3]], 3 if check.dry else 300
            for n in (3,) if check.dry else (1, 3):
                plain = together(gpt, prompts[:n], new, None)
                same = together(gpt, prompts[:n], new, GraphStep(gpt, n)) == plain
                key = f"{family}, {name or 'fp32'}, {n} rows"
                result[key] = "same tokens" if same else "other tokens"
                check.require(same, f"{key}: the captured step gives other tokens than the plain loop")
    return result


def tiny(config: Config, name: str | None) -> GPT:
    groups = 1 if config.n_query_groups == 1 else 4
    sizes = {"n_layer": 2, "n_embd": 128, "n_head": 8, "head_size": 16, "intermediate_size": 192, "block_size": 512}
    config = replace(config, **sizes, padded_vocab_size=96, vocab_size=96, n_query_groups=groups)
    torch.manual_seed(0)
    gpt = GPT(config)
    for parameter in gpt.parameters():
        if parameter.ndim > 1:  # that no two tokens are as likely
            torch.nn.init.normal_(parameter, std=0.2)
    return gpt if name is None else quantize(gpt, name)


def together(gpt: GPT, prompts: list[list[int]], new: int, step: Step | None) -> list[list[int]]:
    rows = [DecodingRow(list(prompt), new, sampling=GREEDY) for prompt in prompts]
    for _ in decode(gpt, rows, gpt.kv_cache(len(rows), max(map(len, prompts)) + new), step=step):
        pass
    return [row.ids for row in rows]


def timed_answers(check: Check) -> dict[str, Any]:
    """Tell how many tokens a second each way to decode gives, of one answer and of 16 together."""
    result: dict[str, Any] = {}
    new = 2 if check.dry else 128
    for name in (None,) if check.dry else FORMATS:
        gpt = random_gpt(check, name).eval()
        ways: dict[str, Any] = {"graph": FastStep(gpt)}
        if not check.dry and name is None:
            ways |= {"eager": lambda rows, cache, gpt=gpt: eager_step(gpt, rows, cache), "compiled": CompiledStep(gpt)}
        for way, step in ways.items():
            for n in (1,) if check.dry or way == "compiled" else (1, 16):
                for counted in (False, True):  # the first answer compiles and captures
                    synchronize()
                    start = time.perf_counter()
                    together(gpt, [list(range(1, 33))] * n, new if counted else 4, step)
                    synchronize()
                key = f"{name or 'bf16'}, {way}" + (f", {n} rows" if n > 1 else "")
                result[key] = f"{n * new / (time.perf_counter() - start):.1f} tokens/s"
                print(f"  {key}: {result[key]}", flush=True)
        sampled = dict(temperature=0.8, top_k=200, step=ways["graph"])
        answer = list(generate(gpt, [1, 2, 3], 3, **sampled))
        check.require(len(answer) == 3, f"{name or 'bf16'}: sampling gave {len(answer)} tokens of 3")
        if not check.dry:
            check.require(isinstance(ways["graph"].chosen, GraphStep), f"{name or 'bf16'}: no graph was captured")
            del gpt, step, ways, sampled
            torch.cuda.empty_cache()
    return result
