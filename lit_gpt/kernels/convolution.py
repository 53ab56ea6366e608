"""The short causal convolution of each channel with gradients of its own, beside its kernel; see
lit_gpt.kernels.functional."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_gpt.kernels import ops
from lit_gpt.kernels.functional import apply_or_forward
from lit_gpt.kernels.trials import Sample, both_passes, ramp, row_count, sampled


def causal_convolution(
    x: Tensor, tail: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor | None
) -> Tensor:
    """Convolve each channel of x with a filter of its own over a token and those before it.

    Args:
        x: (B, T, channels).
        tail: the size - 1 tokens before it, (B, size - 1, channels).
        weight: (channels, 1, size); the last is of the token itself.
        bias: (channels,).
        positions: int64 (T,), of tokens in their packed samples, of which none sees another's; None: x is one.

    Returns:
        Like x.
    """
    if ops.supports_convolution(x, tail):
        return apply_or_forward(_Convolution, x, tail, weight, bias, positions)
    padded, last, T = torch.cat((tail, x), dim=1), weight.size(-1) - 1, x.size(1)
    weights = weight.to(x.dtype).squeeze(1).t()
    y = x * weights[last]
    if bias is not None:
        y = y + bias.to(x.dtype)
    for back in range(1, last + 1):
        earlier = padded[:, last - back : last - back + T]
        if positions is not None:
            earlier = earlier * (positions >= back).to(x.dtype).unsqueeze(1)
        y = torch.addcmul(y, earlier, weights[last - back])
    return y


@sampled("convolution")
def _convolution_sample(dtype: torch.dtype, channels: int, size: int) -> Sample:
    tail, weight = ramp(1, size - 1, channels, dtype=dtype).detach(), ramp(channels, 1, size)
    call = partial(causal_convolution, tail=tail, bias=None, positions=None)
    x = ramp(1, row_count(channels), channels, dtype=dtype)
    return both_passes(lambda x, weight: call(x, weight=weight), x, weight)


class _Convolution(torch.autograd.Function):
    """Keeps x as it is, a part of wider rows perhaps, and not what lies before each token."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, tail: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, tail, weight, positions)
        ctx.bias = None if bias is None else bias.dtype
        wide = None if bias is None else bias.float().contiguous()
        return ops.convolve(x, tail.contiguous(), _by_distance(weight), wide, positions)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, tail, weight, positions = ctx.saved_tensors
        filters = _by_distance(weight)
        x_grad, parts = ops.convolve_backward(grad.contiguous(), x, tail.contiguous(), filters, positions)
        weight_grad = parts.sum(0).flip(0).t().unsqueeze(1).to(weight.dtype)
        bias_grad = grad.flatten(0, 1).sum(0, dtype=torch.float32).to(ctx.bias) if ctx.needs_input_grad[3] else None
        return x_grad, None, weight_grad, bias_grad, None


def _by_distance(weight: Tensor) -> Tensor:
    """Return the weight (channels, 1, size) as float32 (size, channels): of the token itself first."""
    return weight.squeeze(1).t().flip(0).float().contiguous()
