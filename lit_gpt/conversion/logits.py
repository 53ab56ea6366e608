"""Compare the logits of two models: a merge or an export must compute what its source does before it is written."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lit_gpt.errors import UserError

# How far logits may differ, relative to their norm, after weights were rounded to a dtype. Measured: 2e-7, 4e-4, 4e-3
# for SmolLM2-135M; a wrong scale or a swapped projection moves them by more than a finetune did.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of a model, and what is beside them: the units that are in float32 at one time."""
    for child in module.children():
        if not isinstance(module, nn.ModuleList) and any(isinstance(m, nn.ModuleList) for m in child.modules()):
            yield from layers(child)
        else:
            yield child


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Compute in float32, whatever the weights are stored in: each layer's are converted while it computes.

    This takes the memory of the largest layer in float32, not of the whole model. It works for this project's models,
    transformers' and PEFT's alike.
    """
    stored: dict[Tensor, Tensor] = {}

    def convert(layer: nn.Module, *_: object) -> None:
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                stored[tensor] = tensor.data
                tensor.data = tensor.data.float()

    def restore(layer: nn.Module, *_: object) -> None:
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor in stored:
                tensor.data = stored.pop(tensor)

    hooks = []
    for layer in layers(model):
        hooks.append(layer.register_forward_pre_hook(convert))
        hooks.append(layer.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def float32_logits(model: nn.Module, idx: Tensor) -> Tensor:
    """Return a model's logits for `idx` (B, T), computed in float32; the model is a GPT or one of transformers."""
    with in_float32(model):
        output = model.eval()(idx)
    return output if isinstance(output, Tensor) else output.logits


def difference(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of what is expected."""
    return ((actual - expected).norm() / expected.norm()).item()


def rounding(dtype: torch.dtype) -> tuple[float, str]:
    """Return how far rounding to `dtype` may move logits, relative to their norm, and the reason to give for it."""
    return TOLERANCE[dtype], f"that rounding to {str(dtype).removeprefix('torch.')} explains"


def require_within(actual: Tensor, expected: Tensor, allowed: float, why: str, what: str) -> float:
    """Return the relative difference of logits.

    Args:
        allowed: the largest difference to accept; `why` names its cause.
        what: what the logits are of, for the error.

    Raises:
        UserError: the difference is larger, or not a number.
    """
    same_shape = actual.shape == expected.shape
    measured = difference(actual, expected) if same_shape else float("nan")
    if not measured <= allowed:
        shapes = f"{(*actual.shape,)} for {(*expected.shape,)}"
        by = f"by {measured:.1e} of their norm" if same_shape else f"in shape, {shapes}"
        raise UserError(
            f"{what}: its logits differ from the source's {by}, more than the {allowed:.0e} {why}; nothing was written"
        )
    return measured


def check_finetune_kept(actual: Tensor, expected: Tensor, base: Tensor, what: str, mend: str = "") -> float:
    """Return the share of a finetune's change of the base's logits that is in what was made of it: 1, but for rounding.

    Rounding moves logits in directions of its own. Along the finetune's a wrong scale shows that the norm of the
    difference hides in the rounding.

    Args:
        mend: what to do if it is not, for the error.

    Raises:
        UserError: it is not 1 within 5 %, and a tenth of how large the rounding is beside the change.
    """
    change = (expected - base).flatten()
    if not change.any():
        return 1.0
    arrived = ((actual - base).flatten() @ change / (change @ change)).item()
    allowed = 0.05 + 0.1 * ((actual - expected).norm() / change.norm()).item()
    if not abs(arrived - 1) <= allowed:
        raise UserError(
            f"{what}: {arrived:.0%} of the finetune's change of the logits arrived; nothing was written{mend}"
        )
    return arrived
