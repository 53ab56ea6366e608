"""The step of one more token of each row, by the fastest way that there is for the model and its device.

What such a step costs is reading each weight once, if nothing else gets in the way: with torch's operators one by one
it takes several times as long.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_gpt.errors import UsageError
from lit_gpt.model import GPT, KVCache, OneMore
from lit_gpt.native_step import NativeStep, Unsupported

aten = torch.ops.aten


@dataclass(eq=False)
class Row:
    """A sequence that is being continued."""

    ids: list[int]  # its tokens, of the prompt at first; at least one
    room: int  # tokens that may still follow; set to 0, it ends
    generator: torch.Generator | None = None  # of the sampling, on the model's device; None: torch's own
    cached: int = 0  # beginning of the prompt that its place in the cache holds already
    lora: int = 0  # see lit_gpt.loras
    cache: KVCache = field(default_factory=list)  # its place


# The logits that follow each row, (rows, padded_vocab_size), which the next call may overwrite. Each row's place holds
# all of its tokens but the last; rows that are several have the first places of the cache.
Step = Callable[[list[Row], KVCache], Tensor]


def one_more(model: GPT, rows: list[Row], cache: KVCache) -> Tensor:
    """A Step by the model's own operations. A row alone may have more tokens that its place does not hold."""
    device = model.wte.weight.device
    if len(rows) == 1:
        place = rows[0].cache
        idx = torch.tensor([rows[0].ids[place[0].length :]], device=device)
        return model(idx, cache=place, last=True)[:, -1]
    idx = torch.tensor([row.ids[-1:] for row in rows], device=device)
    lengths = tuple(len(row.ids) for row in rows)
    positions, span = torch.tensor(lengths, device=device) - 1, (slice(len(rows)), slice(None), slice(max(lengths)))
    logits = model(idx, cache=[OneMore(x.k[span], x.v[span], positions, lengths) for x in cache], last=True)
    for row in rows:
        for layer in row.cache:
            layer.length += 1
    return logits[:, -1]


class FastStep:
    """A Step.

    On a CPU by lit_gpt.native_step, if it knows all that the model is made of: it is ready at once, so that no answer
    is too short for it. Else, only if it is asked for, by a compiled step, which takes seconds before it is ready.

    Raises:
        UsageError: as CompiledStep, if it is asked for.
    """

    def __init__(self, model: GPT, compile: bool = False) -> None:
        self.model, self.chosen = model, None
        self.otherwise: Step = CompiledStep(model) if compile else partial(one_more, model)

    def __call__(self, rows: list[Row], cache: KVCache) -> Tensor:
        if self.chosen is self.otherwise:
            return self.chosen(rows, cache)
        try:  # not before: the first token, which comes from the prompt, need not wait for it
            self.chosen = self.chosen or NativeStep(self.model, len(cache[0].k))
            return self.chosen(rows, cache)
        except Unsupported:
            self.chosen = self.otherwise
            return self.chosen(rows, cache)


class CompiledStep:
    """The same, compiled: one block, which serves all layers, so that it takes seconds, not minutes.

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
        kind = model.wte.weight.device.type
        if kind == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
            raise UsageError("--compile true: needs a C++ compiler on a CPU; install g++, or leave it out")
        self.model, self.ready = model, False
        compiled = partial(torch.compile, backend=backend)
        self.block, self.head = compiled(run_block), compiled(run_head)

    def __call__(self, rows: list[Row], cache: KVCache) -> Tensor:
        """For one row; several go through the model."""
        if len(rows) > 1:
            return one_more(self.model, rows, cache)
        model, cache = self.model, rows[0].cache
        idx, start = torch.tensor([rows[0].ids[-1:]], device=model.wte.weight.device), cache[0].length
        positions = torch.full((1,), start, device=idx.device)
        with torch.compiler.set_stance(skip_guard_eval_unsafe=self.ready):  # they take a third of a small model's time
            x = model.embed(idx, positions, (start + 1,))
            rotations = model.rotations(positions, (start + 1,), x.dtype)
            for block, rotation, layer in zip(model.h, rotations, cache, strict=True):
                for tensor in () if self.ready else (layer.k, layer.v):  # so that caches of all sizes share the code
                    torch._dynamo.maybe_mark_dynamic(tensor, 2)
                x = self.block(block, x, rotation, layer.k, layer.v, positions)
                layer.length += 1
            logits = self.head(model, x)
        self.ready = True
        return logits[:, -1]


def run_block(
    block: nn.Module, x: Tensor, rotation: tuple[Tensor, Tensor] | None, k: Tensor, v: Tensor, positions: Tensor
) -> Tensor:
    return block(x, rotation, None, OneMore(k, v, positions))


def run_head(model: GPT, x: Tensor) -> Tensor:
    return model.finish(model.lm_head(model.ln_f(x)))


def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Inductor, for which a CPU's product of one row is a loop."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    rules = {aten.mm.default: row_product, aten.addmm.default: biased_row_product}
    return compile_fx(graph, inputs, decompositions={**select_decomp_table(), **rules})


def row_product(x: Tensor, matrix: Tensor) -> Tensor:
    if x.device.type != "cpu" or x.size(0) != 1:
        return NotImplemented
    return (x.t().float() * matrix.float()).sum(0, keepdim=True).to(x.dtype)


def biased_row_product(bias: Tensor, x: Tensor, matrix: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if x.device.type != "cpu" or x.size(0) != 1:
        return NotImplemented
    product = (x.t().float() * matrix.float()).sum(0, keepdim=True)
    return (beta * bias.float() + alpha * product).to(x.dtype)
