"""Whether two models are the same function: what a merge or an export must show before it is written."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lit_gpt.errors import UserError
from lit_gpt.model.gpt import GPT

# How far logits may differ, relative to their norm, after weights were rounded to a dtype. Measured: 2e-7, 4e-4, 4e-3
# for SmolLM2-135M; a wrong scale or a swapped projection moves them by more than a finetune did.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def layers(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a model, and what is beside them: each as large as what is widened at once."""
    for child in module.children():
        if not isinstance(module, nn.ModuleList) and any(isinstance(m, nn.ModuleList) for m in child.modules()):
            yield from layers(child)
        else:
            yield child


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """All arithmetic in float32, whatever the weights are stored in: each layer is widened while it computes.

    Takes the memory of the largest layer in float32, not of the whole model. For this project's models, transformers'
    and PEFT's alike.
    """
    narrow: dict[Tensor, Tensor] = {}

    def widen(layer: nn.Module, *_: object) -> None:
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                narrow[tensor] = tensor.data
                tensor.data = tensor.data.float()

    def restore(layer: nn.Module, *_: object) -> None:
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor in narrow:
                tensor.data = narrow.pop(tensor)

    hooks = []
    for layer in layers(model):
        hooks.append(layer.register_forward_pre_hook(widen))
        hooks.append(layer.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def float32_logits(model: nn.Module, idx: Tensor) -> Tensor:
    """Logits of `idx` (B, T) with all arithmetic in float32, of a GPT or of a model of transformers."""
    with in_float32(model):
        found = model.eval()(idx)
    return found if isinstance(found, Tensor) else found.logits


def probe_ids(model: GPT, length: int = 24) -> Tensor:
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
    return require_within(found, expected, *rounding(dtype), what)


def rounding(dtype: torch.dtype) -> tuple[float, str]:
    """How far rounding to `dtype` may move logits, by their norm; and what to say of that limit."""
    return TOLERANCE[dtype], f"that rounding to {str(dtype).removeprefix('torch.')} explains"


def require_within(found: Tensor, expected: Tensor, allowed: float, why: str, what: str) -> float:
    """The same for a limit of any other cause, which `why` names."""
    same_shape = found.shape == expected.shape
    measured = difference(found, expected) if same_shape else float("nan")
    if not measured <= allowed:
        by = (
            f"by {measured:.1e} of their norm"
            if same_shape
            else f"in shape, {(*found.shape,)} for {(*expected.shape,)}"
        )
        raise UserError(
            f"{what}: its logits differ from the source's {by}, more than the {allowed:.0e} {why}; nothing was written"
        )
    return measured


def check_finetune_kept(found: Tensor, expected: Tensor, base: Tensor, what: str) -> float:
    """How much of what a finetune changes in the base's logits is in what was made of it: 1, but for rounding.

    Rounding moves logits in directions of its own. Along the finetune's a wrong scale shows that the norm of the
    difference hides in the rounding.

    Raises:
        UserError: it is not 1 within 5 %, and a tenth of how large the rounding is beside the change.
    """
    change = (expected - base).flatten()
    if not change.any():
        return 1.0
    arrived = ((found - base).flatten() @ change / (change @ change)).item()
    allowed = 0.05 + 0.1 * ((found - expected).norm() / change.norm()).item()
    if not abs(arrived - 1) <= allowed:
        raise UserError(f"{what}: {arrived:.0%} of the finetune's change of the logits arrived; nothing was written")
    return arrived
