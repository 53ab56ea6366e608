"""Operations written with their gradients, so that they keep less for the backward pass than autograd would, and pass
over memory less often. Their results are those of the plain formulas: tests/kernels/test_functional.py holds them
against those.

Where lit_gpt.kernels.ops has a kernel for the tensors at hand, on a CPU, or lit_gpt.kernels.cuda.ops, on a GPU, it is
taken; torch's operations serve everywhere.

None reads a tensor's contents on the way, so that all run on the meta device and under FakeTensorMode as well.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_gpt.kernels import ops
from lit_gpt.kernels.cuda import launch
from lit_gpt.kernels.declarations import ACTIVATION_NUMBERS
from lit_gpt.kernels.dropout import ALL_KEPT, dropped, kept_share
from lit_gpt.kernels.linear import arithmetic
from lit_gpt.kernels.trials import Sample, both_passes, ramp, row_count, sampled


class _NoContext:
    """Stands for the context of a forward pass that no backward follows."""

    def save_for_backward(self, *given: Any) -> None:
        pass

    mark_dirty = set_materialize_grads = save_for_backward


def apply_or_forward(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Return a function's result, by its forward pass alone where no gradients are wanted.

    torch.compile takes that more readily.
    """
    return function.apply(*arguments) if torch.is_grad_enabled() else function.forward(_NoContext(), *arguments)


def triton_kernels(*tensors: Tensor) -> Any:
    """Return lit_gpt.kernels.cuda.ops if its kernels serve tensors like these, else None."""
    if not launch.serves(*tensors):
        return None
    from lit_gpt.kernels.cuda import ops  # Triton is not imported where it does not serve

    return ops


def low_rank_update(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    parts: list[tuple[int, int]],
    scale: float,
    dropout: float = 0.0,
    keys: Tensor | None = None,
) -> Tensor:
    """Add scale * B_i A_i dropout(x) to the columns `parts[i]` of y in place, and return y (Hu et al. 2021, LoRA).

    Args:
        y: (T, out_features), of the dtype of the arithmetic; what made it must not have kept it.
        x: (T, in_features).
        A: (len(parts) * r, in_features), float32: an A for each part, one below the other.
        B: (sum of the parts' lengths, r), float32: a B for each part, one below the other.
        parts: (start, stop) of columns.
        dropout: probability to drop an element of x.
        keys: int64 (T,), by which elements are dropped, see lit_gpt.kernels.dropout; None: none are.
    """
    kept = ALL_KEPT if keys is None else kept_share(dropout)
    factor = scale * ALL_KEPT / kept if kept else 0.0
    triton = triton_kernels(y, x)
    if triton is not None and triton.supports_lora(y, x, A):
        return apply_or_forward(_LowRankKernel, y, x, A, B, keys, kept, parts, factor, triton)
    if ops.supports_lora(y, x, B, keys, parts):
        return apply_or_forward(_LowRankKernel, y, x, A, B, keys, kept, parts, factor, ops)
    return apply_or_forward(_LowRankUpdate, y, x, A, B, keys, kept, parts, factor)


@sampled("LoRA")
def _low_rank_sample(dtype: torch.dtype, width: int, adapted: int, n: int, r: int, drops: int) -> Sample:
    edges, count = [adapted * i // n // 8 * 8 for i in range(n + 1)], row_count(max(width, adapted))
    rest = [*pairwise(edges)], 1.0, 0.05, torch.arange(count) if drops else None

    def call(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return low_rank_update(x.new_zeros(count, edges[-1]), x, A, B, *rest)

    return both_passes(call, ramp(count, width, dtype=dtype), ramp(n * r, width), ramp(edges[-1], r))


class _LowRankKernel(torch.autograd.Function):
    """Keeps the low-rank product, and x if A trains; what is dropped follows from the keys."""

    @staticmethod
    def forward(ctx, y, x, A, B, keys, kept, parts, factor, kernels):
        ctx.rest = kept, *map(list, zip(*parts, strict=True)), factor
        ctx.kernels = kernels
        low = kernels.lora_(y, x, A, B, keys, *ctx.rest)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x if trains(ctx, 2) else None, A, B, keys, low)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, A, B, keys, low = ctx.saved_tensors
        x_grad, A_grad, B_grad = ctx.kernels.lora_backward(grad.contiguous(), x, A, B, keys, *ctx.rest, low)
        x_grad, A_grad = (x_grad if ctx.needs_input_grad[1] else None), (None if x is None else A_grad)
        return grad, x_grad, A_grad, B_grad, None, None, None, None, None


class _LowRankUpdate(torch.autograd.Function):
    """Keeps the low-rank product, and x if A trains; what is dropped follows from the keys."""

    @staticmethod
    def forward(ctx, y, x, A, B, keys, kept, parts, factor):
        ctx.kept, ctx.parts, ctx.factor = kept, parts, factor
        dtype = arithmetic(y.device, y.dtype)
        low = _dropped(x.to(y.dtype), keys, kept).to(dtype) @ A.to(dtype).t()  # (T, len(parts) * r)
        for columns, rows, weight in _parts(ctx, y, low, B):
            if dtype == y.dtype:
                columns.addmm_(rows, weight.t())
            else:
                columns.add_(rows @ weight.t())
        ctx.mark_dirty(y)
        ctx.save_for_backward(x if trains(ctx, 2) else None, A, B, low, keys)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, A, B, low, keys = ctx.saved_tensors
        wide = grad.contiguous().to(low.dtype)
        low_grads, B_grads = [], []
        for columns, rows, weight in _parts(ctx, wide, low, B):
            low_grads.append(columns @ weight)
            B_grads.append((rows.t() @ columns).t())
        low_grad = torch.cat(low_grads, dim=-1)
        x_grad = None
        if ctx.needs_input_grad[1]:
            x_grad = _dropped((low_grad @ A.to(low.dtype)).to(grad.dtype), keys, ctx.kept).to(ctx.dtype)
        A_grad = None
        if x is not None:
            A_grad = (low_grad.t() @ _dropped(x.to(grad.dtype), keys, ctx.kept).to(low.dtype)).to(A.dtype)
        return grad, x_grad, A_grad, torch.cat(B_grads).to(B.dtype).mul_(ctx.factor), None, None, None, None


def _dropped(x: Tensor, keys: Tensor | None, kept: int) -> Tensor:
    """Return what `dropped` does, in one pass where a kernel serves."""
    if keys is None or not ops.supports_on(x.device, x.dtype):
        return dropped(x, keys, kept)
    return ops.drop(x.contiguous(), keys, kept)


def trains(ctx: Any, i: int) -> bool:
    """Return whether a function's argument `i` gets a gradient."""
    return getattr(ctx, "needs_input_grad", ())[i : i + 1] == (True,)


def _parts(ctx: Any, y: Tensor, low: Tensor, B: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield for each part its columns of y, its columns of the low-rank product, and its scaled B."""
    B = (B * ctx.factor).to(low.dtype)
    weights = B.split([stop - start for start, stop in ctx.parts])
    for (start, stop), rows, weight in zip(ctx.parts, low.split(B.size(1), dim=-1), weights, strict=True):
        yield y[:, start:stop], rows, weight


def scaled(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return scale * (y + shift) (Gao et al. 2023, LLaMA-Adapter V2); y: (..., size), scale, shift: float32 (size,)."""
    if (triton := triton_kernels(y)) is not None and scale.dtype == shift.dtype == torch.float32 and y.numel():
        return apply_or_forward(_ScaledKernel, y, scale, shift, triton)
    return apply_or_forward(_Scaled, y, scale, shift)


class _ScaledKernel(torch.autograd.Function):
    """Keeps y."""

    @staticmethod
    def forward(ctx, y, scale, shift, triton):
        ctx.triton, given = triton, (y.contiguous(), scale.contiguous(), shift.contiguous())
        ctx.save_for_backward(*given)
        return triton.scaled(*given)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *ctx.triton.scaled_backward(grad.contiguous(), *ctx.saved_tensors), None


class _Scaled(torch.autograd.Function):
    """Keeps y."""

    @staticmethod
    def forward(ctx, y, scale, shift):
        ctx.save_for_backward(y, scale, shift)
        return torch.addcmul((scale * shift).to(y.dtype), y, scale.to(y.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, scale, shift = ctx.saved_tensors
        total = grad.flatten(0, -2).sum(0, dtype=scale.dtype)
        scale_grad = (grad * y).flatten(0, -2).sum(0, dtype=scale.dtype).addcmul_(shift, total)
        return grad * scale.to(grad.dtype), scale_grad, total * scale


def sum_of_three(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return a + b + c; all are of one shape."""
    if (triton := triton_kernels(a, b, c)) is None:
        return a + b + c
    return apply_or_forward(_SumOfThree, a, b, c, triton)


class _SumOfThree(torch.autograd.Function):
    """Keeps nothing."""

    @staticmethod
    def forward(ctx, a, b, c, triton):
        return triton.sum_of_three(a.contiguous(), b.contiguous(), c.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad, grad, grad, None


@dataclass(frozen=True)
class Activation:
    """An elementwise function.

    Attributes:
        gradient: returns the gradient of the input, from the gradient of the result and the input.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)


aten = torch.ops.aten
ACTIVATIONS = {
    activation.name: activation
    for activation in (
        Activation("gelu", F.gelu, aten.gelu_backward),
        Activation("gelu_tanh", partial(F.gelu, approximate="tanh"), partial(aten.gelu_backward, approximate="tanh")),
        Activation("relu", F.relu, partial(aten.threshold_backward, threshold=0)),
        Activation("relu2", lambda x: F.relu(x).square(), lambda grad, x: 2 * grad * F.relu(x)),
        Activation("silu", F.silu, aten.silu_backward),
    )
}


def gated(gate_up: Tensor, activation: Activation) -> Tensor:
    """Return activation(gate) * up (Shazeer 2020); gate_up: (..., 2 * size), the gate's half first."""
    return apply_or_forward(_Gated, gate_up, activation)


@sampled("gated silu")
def _silu_sample(dtype: torch.dtype, width: int) -> Sample:
    return both_passes(partial(gated, activation=ACTIVATIONS["silu"]), ramp(row_count(width), width, dtype=dtype))


@sampled("gated gelu_tanh")
def _gelu_sample(dtype: torch.dtype, width: int) -> Sample:
    return both_passes(partial(gated, activation=ACTIVATIONS["gelu_tanh"]), ramp(row_count(width), width, dtype=dtype))


class _Gated(torch.autograd.Function):
    """Keeps its input."""

    @staticmethod
    def forward(ctx, gate_up, activation):
        ctx.save_for_backward(gate_up)
        ctx.activation, ctx.triton = activation, triton_kernels(gate_up)
        if ctx.triton is not None:
            return ctx.triton.gated(gate_up.contiguous(), activation.name)
        ctx.cpp = ops.supports_gated(gate_up, activation.name)
        if ctx.cpp:
            return ops.gated(gate_up.contiguous(), ACTIVATION_NUMBERS[activation.name])
        gate, up = gate_up.chunk(2, dim=-1)
        return activation(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (gate_up,), activation = ctx.saved_tensors, ctx.activation
        if ctx.triton is not None:
            return ctx.triton.gated_backward(grad.contiguous(), gate_up.contiguous(), activation.name), None
        if ctx.cpp:
            kind = ACTIVATION_NUMBERS[activation.name]
            return ops.gated_backward(grad.contiguous(), gate_up.contiguous(), kind), None
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.cat((activation.gradient(grad * up, gate), grad * activation(gate)), dim=-1), None


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, head_size: int) -> Tensor:
    """Rotate the first rope_n_elem elements of the first `heads` heads of qkv, in a copy (Su et al. 2021, RoFormer).

    Args:
        qkv: (B, T, any number of heads * head_size).
        cos, sin: (T, rope_n_elem) or (B, T, rope_n_elem); the second half repeats the first.
    """
    return apply_or_forward(_Rotate, qkv, cos, sin, heads, head_size)


@sampled("rotary")
def _rotary_sample(dtype: torch.dtype, width: int, heads: int, head_size: int, n: int) -> Sample:
    angles = ramp(row_count(width), n, dtype=dtype).detach()
    call = partial(rotate, cos=angles, sin=angles, heads=heads, head_size=head_size)
    return both_passes(call, ramp(1, row_count(width), width, dtype=dtype))


def rotate_split(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, head_size: int, widths: Sequence[int]
) -> tuple[Tensor, ...]:
    """Rotate heads as `rotate` does, perhaps in place, and split the last dimension into parts of these widths.

    What made qkv must not have kept it, and nobody else may use it.
    """
    triton = triton_kernels(qkv, cos)
    if triton is None or not triton.supports_rotation(qkv, cos, head_size) or not qkv.is_contiguous():
        return rotate(qkv, cos, sin, heads, head_size).split(list(widths), dim=-1)
    return apply_or_forward(_RotateInPlace, qkv, cos, sin, heads, head_size, widths, triton)


class _RotateInPlace(torch.autograd.Function):
    """Keeps the angles, which all layers share. The gradients of the parts are put together as they are rotated."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, heads, head_size, widths, triton):
        ctx.save_for_backward(cos, sin)
        ctx.heads, ctx.triton = (heads, head_size), triton
        # for autograd a tensor of its own: nothing that is kept lies here, and views are dear to change in place
        return triton.rotate_(qkv.detach(), cos, sin, heads, head_size).split(list(widths), dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        return ctx.triton.rotated(grads, *ctx.saved_tensors, *ctx.heads, -1.0), *[None] * 6


class _Rotate(torch.autograd.Function):
    """Keeps the angles, which all layers share."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, *heads):
        ctx.save_for_backward(cos, sin)
        ctx.heads, ctx.turned = heads, _rotation_kernel(qkv, cos, *heads)
        return ctx.turned(qkv, cos, sin, 1.0, *heads)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return ctx.turned(grad, cos, sin, -1.0, *ctx.heads), None, None, None, None


def _rotation_kernel(qkv: Tensor, cos: Tensor, heads: int, head_size: int) -> Callable[..., Tensor]:
    """Return what rotates tensors like these."""
    triton = triton_kernels(qkv, cos)
    if triton is not None and triton.supports_rotation(qkv, cos, head_size):
        return partial(_rotated_by_triton, triton)
    sizes = qkv.size(-1), heads, head_size, cos.size(-1)
    return _rotated_by_cpp if ops.supports("rotary", sizes, qkv, cos) else _rotated


def _rotated_by_triton(
    triton: Any, qkv: Tensor, cos: Tensor, sin: Tensor, sign: float, heads: int, head_size: int
) -> Tensor:
    return triton.rotated([qkv], cos, sin, heads, head_size, sign)


def _rotated_by_cpp(qkv: Tensor, cos: Tensor, sin: Tensor, sign: float, heads: int, head_size: int) -> Tensor:
    angles = (x.expand(*qkv.shape[:2], x.size(-1)).contiguous() for x in (cos, sin))
    return ops.rotate(qkv.contiguous(), *angles, heads, head_size, sign)


def _rotated(qkv: Tensor, cos: Tensor, sin: Tensor, sign: float, heads: int, head_size: int) -> Tensor:
    n, sin = cos.size(-1), sin * sign
    cos, sin = (x[..., None, : n // 2] for x in (cos, sin))
    qkv = qkv.clone(memory_format=torch.contiguous_format)
    low, high = qkv.view(*qkv.shape[:2], -1, head_size)[:, :, :heads, :n].chunk(2, dim=-1)
    turned = low * cos - high * sin
    high.copy_(high * cos + low * sin)
    low.copy_(turned)
    return qkv
