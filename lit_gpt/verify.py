"""Whether two models are the same function: what a merge or an export must show before it is written."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lit_gpt.errors import UserError
from lit_gpt.model import GPT

# How far logits may differ, relative to their norm, after weights were rounded to a dtype. Measured: 2e-7, 4e-4, 4e-3
# for SmolLM2-135M; a wrong scale or a swapped projection moves them by more than a finetune did.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


class _Widened(nn.Module):
    """Runs a module in float32, widening a copy of it for the time of one call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return copy.deepcopy(self.module).float()(*args, **kwargs)


@contextmanager
def _widened(model: GPT) -> Iterator[None]:
    wte, blocks, ln_f, head = model.wte, model.h, model.ln_f, model.lm_head
    model.wte, model.ln_f, model.lm_head = _Widened(wte), _Widened(ln_f), _Widened(head)
    model.h = nn.ModuleList(_Widened(block) for block in blocks)
    try:
        yield
    finally:
        model.wte, model.h, model.ln_f, model.lm_head = wte, blocks, ln_f, head


@torch.no_grad()
def float32_logits(model: GPT, idx: Tensor) -> Tensor:
    """Logits of `idx` (B, T) with all arithmetic in float32, whatever the weights are stored in.

    Takes the memory of the largest block in float32, not of the whole model.
    """
    with _widened(model):
        return model.eval()(idx)


def probe(model: GPT, length: int = 24) -> Tensor:
    """Token ids (2, length) to compare models on, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (2, min(length, model.config.block_size)), generator=generator)


def difference(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to the norm of what is expected."""
    return ((found - expected).norm() / expected.norm()).item()


def require_equal(found: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> float:
    """The relative difference of logits, if it is what rounding to `dtype` explains.

    Raises:
        UserError: it is not (or not a number).
    """
    measured, allowed = difference(found, expected), TOLERANCE[dtype]
    if not measured <= allowed:
        raise UserError(
            f"{what}: its logits differ from the source's by {measured:.1e} of their norm, more than the {allowed:.0e} "
            f"that rounding to {str(dtype).removeprefix('torch.')} explains; nothing was written"
        )
    return measured
