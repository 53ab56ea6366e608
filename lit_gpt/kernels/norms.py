"""LayerNorm and RMSNorm with gradients of their own, beside their kernels; see lit_gpt.kernels.functional."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_gpt.kernels import ops
from lit_gpt.kernels.functional import apply_or_forward, triton_kernels


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return weight * (x - mean(x)) / deviation(x) + bias (Ba et al. 2016); x: (..., size), weight, bias: (size,)."""
    given = [p for p in (weight, bias) if p is not None]
    if (triton := triton_kernels(x, *given)) is None:
        return F.layer_norm(x, (x.size(-1),), weight, bias, eps)
    return apply_or_forward(_NormKernel, x, weight, bias, triton, triton.Norm(eps, centered=True))


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Return (offset + weight) * x / rms(x) (Zhang & Sennrich 2019); x: (..., size), weight: (size,).

    The mean square is taken in float32, and with an offset, to which narrow weights would be lost, so is all.
    """
    if (triton := triton_kernels(x, weight)) is None:
        return apply_or_forward(_RMSNorm, x, weight, eps, offset)
    return apply_or_forward(_NormKernel, x, weight, None, triton, triton.Norm(eps, centered=False, offset=offset))


class _NormKernel(torch.autograd.Function):
    """Keeps x, and of each row the mean and the inverse of the deviation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, triton: Any, kind: Any) -> Tensor:
        x, y, means, inverses = triton.norm(x.contiguous(), weight, bias, kind)
        ctx.save_for_backward(x, weight, means, inverses)
        ctx.triton, ctx.kind = triton, kind
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, means, inverses = ctx.saved_tensors
        trains = {"weight_trains": ctx.needs_input_grad[1], "bias_trains": ctx.needs_input_grad[2]}
        grads = ctx.triton.norm_backward(grad.contiguous(), x, weight, means, inverses, ctx.kind, **trains)
        x_grad, *rest = (None if g is None else g.to(x.dtype) for g in grads)
        return x_grad, *rest, None, None


class _RMSNorm(torch.autograd.Function):
    """Keeps x and the inverse of the rms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        if ops.supports(x, weight):
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
        if not ctx.needs_input_grad[1] and ops.supports(x, weight, grad):
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
