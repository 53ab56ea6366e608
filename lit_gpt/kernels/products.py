"""Products of many rows with a weight as it is stored, by the C++ kernel of cpp/linear.cpp: what a prompt takes."""

import functools

import torch
from torch import Tensor

from lit_gpt.kernels import ops
from lit_gpt.kernels.declarations import FORMAT_NUMBERS
from lit_gpt.kernels.policy import WIDE_VECTORS, policy


def supports_linear(x: Tensor, weight: Tensor) -> bool:
    """Return whether kernels multiply rows like x with a weight as it is stored, where no gradients are wanted.

    They are written for AVX2 and AVX512; where there are matrix units, oneDNN is several times as fast by these.
    """
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return False
    if policy().simulate_cuda or torch.is_autocast_enabled("cpu") or not weight.is_contiguous() or not x.numel():
        return False
    return _has_vectors() and ops.supports_on(x.device, x.dtype)


@functools.cache
def _has_vectors() -> bool:
    return WIDE_VECTORS and not torch.cpu._is_amx_tile_supported()


@ops.operator(
    "linear(Tensor x, Tensor weight, Tensor? scale, Tensor? zero, Tensor? pairs, Tensor? bias) -> Tensor",
    lambda x, weight, *_: x.new_empty(*x.shape[:-1], len(weight)),
)
def linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, zero: Tensor | None, pairs: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return x W^T + bias for x (..., columns), in its dtype, with sums in float32.

    Args:
        weight: (rows, columns) in x's dtype; or the codes of a quantized one, with the rest as `dequantize` takes it.
        bias: (rows,), in x's dtype.
    """
    y, x = x.new_empty(*x.shape[:-1], len(weight)), x.contiguous()
    kind = FORMAT_NUMBERS[str(x.dtype)[6:]] if scale is None else ops.quantized_format(weight, scale)
    ops.call("linear", "linear", x, kind, weight, scale, zero, pairs, len(weight), x.size(-1), x, ops.rows(x), bias, y)
    return y
