"""LayerNorm and RMSNorm with gradients of their own, beside their kernels; see lit_gpt.kernels.functional."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_gpt.kernels import ops
from lit_gpt.kernels.functional import apply_or_forward, triton_kernels
from lit_gpt.kernels.trials import Sample, both_passes, ramp, row_count, sampled


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return weight * (x - mean(x)) / deviation(x) + bias (Ba et al. 2016); x: (..., size), weight, bias: (size,)."""
    return add_and_layer_norm(x, None, 1.0, weight, bias, eps)[1]


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Return (offset + weight) * x / rms(x) (Zhang & Sennrich 2019); x: (..., size), weight: (size,).

    The mean square is taken in float32, and with an offset, to which narrow weights would be lost, so is all.
    """
    return add_and_rms_norm(x, None, 1.0, weight, eps, offset)[1]


def add_and_layer_norm(
    x: Tensor, added: Tensor | None, scale: float, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the residual stream x + scale * added, or x, and its `layer_norm`."""
    triton = triton_kernels(*(t for t in (x, added, weight, bias) if t is not None))
    if triton is None:
        stream = x if added is None else torch.add(x, added, alpha=scale)
        return stream, F.layer_norm(stream, (x.size(-1),), weight, bias, eps)
    return apply_or_forward(_AddAndNorm, x, added, scale, weight, bias, triton, triton.Norm(eps, centered=True))


def add_and_rms_norm(
    x: Tensor, added: Tensor | None, scale: float, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the residual stream x + scale * added, or x, and its `rms_norm`."""
    triton = triton_kernels(*(t for t in (x, added, weight) if t is not None))
    if triton is None:
        stream = x if added is None else torch.add(x, added, alpha=scale)
        return stream, apply_or_forward(_RMSNorm, stream, weight, eps, offset)
    kind = triton.Norm(eps, centered=False, offset=offset)
    return apply_or_forward(_AddAndNorm, x, added, scale, weight, None, triton, kind)


@sampled("RMSNorm")
def _rms_norm_sample(dtype: torch.dtype, width: int) -> Sample:
    weight = ramp(width, dtype=dtype).detach()
    return both_passes(partial(rms_norm, weight=weight, eps=1e-5), ramp(row_count(width), width, dtype=dtype))


class _AddAndNorm(torch.autograd.Function):
    """Keeps the stream, and of each row the mean and the inverse of the deviation.

    The gradients that the stream gets from its norm and from elsewhere are added where the norm's is computed.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor | None, scale: float, weight: Tensor | None, bias: Tensor | None,
        triton: Any, kind: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        given = None if added is None else added.contiguous()
        stream, y, means, inverses = triton.norm(x.contiguous(), weight, bias, kind, given, scale)
        ctx.save_for_backward(stream, weight, means, inverses)
        ctx.triton, ctx.kind, ctx.scale = triton, kind, scale
        ctx.set_materialize_grads(False)
        return x if added is None else stream, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, stream_grad: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        needs, scale = ctx.needs_input_grad, ctx.scale
        x_grad, weight_grad, bias_grad = stream_grad, None, None
        if grad is not None:
            x, weight, means, inverses = ctx.saved_tensors
            others = None if stream_grad is None else stream_grad.contiguous()
            given = grad.contiguous(), x, weight, means, inverses, ctx.kind, others, needs[3], needs[4]
            grads = ctx.triton.norm_backward(*given)
            x_grad, weight_grad, bias_grad = (None if g is None else g.to(x.dtype) for g in grads)
        added_grad = None
        if needs[1] and x_grad is not None:
            added_grad = x_grad if scale == 1.0 else x_grad * scale
        return x_grad, added_grad, None, weight_grad, bias_grad, None, None


class _RMSNorm(torch.autograd.Function):
    """Keeps x and the inverse of the rms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        ctx.cpp = ops.supports("RMSNorm", (x.size(-1),), x, weight)
        if ctx.cpp:
            y, inverse = ops.rms_norm(x.contiguous(), weight, eps, offset)
            ctx.save_for_backward(x, inverse, weight)
            ctx.offset = offset
            return y
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, inverse, weight)
        ctx.offset = offset
        if offset:
            return (wide * inverse).mul_(offset + weight.float()).to(x.dtype)
        return weight * (wide * inverse).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, inverse, weight = ctx.saved_tensors
        if not ctx.needs_input_grad[1] and ctx.cpp:
            x_grad = ops.rms_norm_backward(*(t.contiguous() for t in (grad, x)), weight, inverse, ctx.offset)
            return x_grad, None, None, None
        normed = x.to(torch.float32, copy=True).mul_(inverse)
        x_grad = weight_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            wide = grad.to(torch.float32, copy=True).mul_(ctx.offset + weight.float() if ctx.offset else weight)
            along = (wide * normed).mean(-1, keepdim=True)
            x_grad = wide.addcmul_(normed, along, value=-1).mul_(inverse).to(x.dtype)
        return x_grad, weight_grad, None, None
