"""The step of one token through torch.compile: one compiled block that serves all layers."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_gpt.errors import UsageError
from lit_gpt.generation.sequence import DecodingRow, eager_step
from lit_gpt.model.gpt import GPT
from lit_gpt.model.kv_cache import AttentionCache, DecodeCache, KVCache
from lit_gpt.model.rope import Rotation

aten = torch.ops.aten


class CompiledStep:
    """Takes a Step by one compiled block, which serves all layers, so that compiling takes seconds, not minutes.

    torch's own product of one row reaches a third of the memory's speed on a CPU; as a plain loop over the weight's
    rows, which the compiler makes of it here, it reaches most.

    The first call compiles. What is compiled holds for this model, for caches of any size; torch keeps it on disk, so
    that another process is ready sooner.

    Raises:
        UsageError: the model cannot be compiled, or there is nothing to compile with.
    """

    def __init__(self, model: GPT) -> None:
        if model.config.n_expert:
            raise UsageError("--compile true: routed experts cannot be compiled; leave it out")
        if others := model.config.other_mixers:
            mixer = model.config.mixer(others[0])
            raise UsageError(f"--compile true: the mixer {mixer} cannot be compiled; leave it out")
        if model.config.kv_layers or model.layer_inputs:
            raise UsageError("--compile true: shared keys and inputs of layers cannot be compiled; leave it out")
        kind = model.wte.weight.device.type
        if kind == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
            raise UsageError("--compile true: needs a C++ compiler on a CPU; install g++, or leave it out")
        self.model, self.ready = model, False
        self.slot: KVCache = []  # of the row of the last call
        compiled = partial(torch.compile, backend=backend)
        self.block, self.head = compiled(run_block), compiled(run_head)

    def __call__(self, rows: list[DecodingRow], cache: KVCache) -> Tensor:
        """Return the logits that follow each row: of one row compiled, of several by the model's own operations."""
        if len(rows) > 1:
            return eager_step(self.model, rows, cache)
        model, cache = self.model, rows[0].cache
        # another row may have a LoRA of another rank, which is compiled anew
        self.ready, self.slot = self.ready and cache is self.slot, cache
        idx, start = torch.tensor([rows[0].ids[-1:]], device=model.wte.weight.device), cache[0].length
        positions = torch.full((1,), start, device=idx.device)
        with torch.compiler.set_stance(skip_guard_eval_unsafe=self.ready):  # they take a third of a small model's time
            x = model.embed(idx, positions, (start + 1,))
            rotations = model.rotations(positions, (start + 1,), x.dtype)
            for block, rotation, layer in zip(model.h, rotations, cache, strict=True):
                assert isinstance(layer, AttentionCache)
                for tensor in () if self.ready else (layer.k, layer.v):  # so that caches of all sizes share the code
                    torch._dynamo.maybe_mark_dynamic(tensor, 2)
                x = self.block(block, x, rotation, layer.k, layer.v, positions)
                layer.length += 1
            logits = self.head(model, x)
        self.ready = True
        return logits[:, -1]


def run_block(
    block: nn.Module, x: Tensor, rotation: Rotation | None, k: Tensor, v: Tensor, positions: Tensor
) -> Tensor:
    return block(x, rotation, None, DecodeCache(k, v, positions))


def run_head(model: GPT, x: Tensor) -> Tensor:
    return model.postprocess_logits(model.lm_head(model.ln_f(x)))


def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Compile by Inductor, for which a CPU's product of one row is a loop."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    rules: dict[Any, Callable[..., Any]] = {aten.mm.default: row_product, aten.addmm.default: biased_row_product}
    table = {**select_decomp_table(), **rules}
    return compile_fx(graph, inputs, decompositions=table)  # type: ignore[return-value]  # it may return code elsewhere


def row_product(x: Tensor, matrix: Tensor) -> Tensor:
    if x.device.type != "cpu" or x.size(0) != 1:
        return NotImplemented
    return (x.t().float() * matrix.float()).sum(0, keepdim=True).to(x.dtype)


def biased_row_product(bias: Tensor, x: Tensor, matrix: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if x.device.type != "cpu" or x.size(0) != 1:
        return NotImplemented
    product = (x.t().float() * matrix.float()).sum(0, keepdim=True)
    return (beta * bias.float() + alpha * product).to(x.dtype)
