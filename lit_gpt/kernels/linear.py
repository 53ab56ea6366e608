"""Products with a weight: of bfloat16 by a kernel where no gradients are wanted, as of a prompt; else of 16 bits in
float32 where a CPU has no arithmetic for them, and of float32 by oneDNN.

For 16 bits torch's own are far slower there; weights stay stored as they are, and are widened a piece at a time. Of
float32 torch's own are MKL's, which leave the wide vectors of processors by others than Intel unused.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_gpt.kernels import products
from lit_gpt.kernels.policy import policy
from lit_gpt.kernels.trials import Sample, both_passes, chosen, ramp, sampled

WIDE_ELEMENTS = 2**20  # of a weight, widened at a time: 4 MiB
FEW_ROWS = 16  # for fewer, widening the weight costs more than its arithmetic saves
MANY_ROWS = 192  # for more, oneDNN's products of bfloat16 are faster than the kernel's, which lays out no weights anew


def arithmetic(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which products of tensors of `dtype` are to be computed."""
    if torch.compiler.is_compiling() or device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype  # before the policy is asked for, at which torch.compile would break its graph
    return torch.float32 if policy().widen and not policy().simulate_cuda else dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias, in x's dtype.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,).
    """
    few = x.numel() < FEW_ROWS * x.size(-1)
    if not few and by_kernel(x, weight):
        return products.linear(x, weight, None, None, None, bias)
    if not few and arithmetic(x.device, x.dtype) != x.dtype:
        return _WideLinear.apply(x, weight, bias)
    if not few and by_onednn(x, weight):
        return _OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def by_kernel(x: Tensor, weight: Tensor) -> bool:
    """Return whether a kernel is to compute products of these: in bfloat16, without gradients."""
    if not x.dtype == weight.dtype == torch.bfloat16 or not products.supports_linear(x, weight):
        return False
    return policy().widen or x.numel() <= MANY_ROWS * x.size(-1)


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Return whether oneDNN is to compute products of these: in float32, where it is faster."""
    if torch.compiler.is_compiling() or not onednn_takes(x, weight):
        return False
    if policy().simulate_cuda or torch.is_autocast_enabled("cpu"):
        return False
    return chosen("product", torch.float32)


def onednn_takes(*factors: Tensor) -> bool:
    """Return whether oneDNN multiplies these: in float32 on a CPU, and none of depth 0, as of a rank of 0."""
    alike = all(x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() for x in factors)
    return alike and torch.backends.mkldnn.is_available()


@sampled("product", "onednn")
def _product_sample(dtype: torch.dtype) -> Sample:
    weight = ramp(1024, 1024, dtype=dtype).detach()
    return both_passes(lambda x: linear(x, weight), ramp(256, 1024, dtype=dtype))


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a b^T + bias in float32, by oneDNN or MKL; a: (..., depth), b: (columns, depth)."""
    return onednn_product(a, b, bias) if by_onednn(a, b) else F.linear(a, b, bias)


def onednn_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a b^T + bias of what `onednn_takes`.

    Of 8 rows or more each is summed in the same order whatever others there are. MKL, where it has Intel's
    instructions, takes another order for other numbers of rows.

    Args:
        a: (rows, depth).
        b: (columns, depth).
    """
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    """Keeps the weight, and x if the weight trains."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        x_grad = weight_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = _product(grad, weight.t())
        rows = grad.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            weight_grad = _product(rows.t(), x.flatten(0, -2).t())
        if ctx.needs_input_grad[2]:
            bias_grad = rows.sum(0)
        return x_grad, weight_grad, bias_grad


def spans(weight: Tensor) -> list[slice]:
    """Return the rows of each piece of a weight that is widened at a time."""
    size = max(1, WIDE_ELEMENTS // weight.size(1))
    return [slice(start, start + size) for start in range(0, len(weight), size)]


def _part(bias: Tensor | None, span: slice) -> Tensor | None:
    return None if bias is None else bias[span].float()


class _WideLinear(torch.autograd.Function):
    """Keeps the weight as it is stored, and x if the weight trains."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        rows, y = x.reshape(-1, x.size(-1)).float(), x.new_empty(*x.shape[:-1], len(weight))
        for span in spans(weight):
            y.view(-1, len(weight))[:, span] = _product(rows, weight[span].float(), _part(bias, span))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wide = grad.reshape(-1, grad.size(-1)).float()
        x_grad = weight_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            total = wide.new_zeros(len(wide), weight.size(1))
            for span in spans(weight):
                total += _product(wide[:, span], weight[span].float().t())
            x_grad = total.to(grad.dtype).view(*grad.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            weight_grad = _product(wide.t(), x.reshape(-1, x.size(-1)).float().t()).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            bias_grad = wide.sum(0).to(grad.dtype)
        return x_grad, weight_grad, bias_grad
