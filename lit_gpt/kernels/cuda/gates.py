"""Gated activations (Shazeer 2020, GLU Variants Improve Transformer), forward and backward, computed in float32."""

import torch
from torch import Tensor

from lit_gpt.kernels.cuda.language import jit, tl
from lit_gpt.kernels.cuda.launch import launch

BLOCK = 1024


@jit
def activated(x, KIND: tl.constexpr):  # fmt: skip
    """Return the activation of x, float32, and its slope there."""
    if KIND == "gelu":
        below = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        return x * below, below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif KIND == "gelu_tanh":
        cubic = 0.044715 * x * x
        gate = tl.sigmoid(1.5957691216057308 * x * (1.0 + cubic))  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        within = tl.where(gate * (1.0 - gate) == 0.0, 0.0, 1.5957691216057308 * x * (1.0 + 3.0 * cubic))
        return x * gate, gate + gate * (1.0 - gate) * within
    elif KIND == "relu":
        return tl.maximum(x, 0.0), tl.where(x > 0.0, 1.0, 0.0)
    elif KIND == "relu2":
        positive = tl.maximum(x, 0.0)
        return positive * positive, 2.0 * positive
    else:
        tl.static_assert(KIND == "silu")
        gate = tl.sigmoid(x)
        return x * gate, gate * (1.0 + x * (1.0 - gate))


@jit
def gated_kernel(gate_up, y, count, size, KIND: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = gate_up + index + index // size * size
    gate = tl.load(at, index < count, 0.0).to(tl.float32)
    up = tl.load(at + size, index < count, 0.0).to(tl.float32)
    value, _ = activated(gate, KIND)
    tl.store(y + index, (value * up).to(y.dtype.element_ty), index < count)


@jit
def gated_backward_kernel(
    grad, gate_up, gate_up_grad, count, size, KIND: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = index + index // size * size
    slope = tl.load(grad + index, index < count, 0.0).to(tl.float32)
    gate = tl.load(gate_up + at, index < count, 0.0).to(tl.float32)
    up = tl.load(gate_up + at + size, index < count, 0.0).to(tl.float32)
    value, steepness = activated(gate, KIND)
    dtype = gate_up_grad.dtype.element_ty
    tl.store(gate_up_grad + at, (slope * up * steepness).to(dtype), index < count)
    tl.store(gate_up_grad + at + size, (slope * value).to(dtype), index < count)


def gated(gate_up: Tensor, kind: str) -> Tensor:
    """Return activation(gate) * up for gate_up (..., 2 * size), contiguous; `kind` is a key of ACTIVATIONS."""
    size = gate_up.size(-1) // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], size)
    launch(gated_kernel, (-(-y.numel() // BLOCK),), gate_up, y, y.numel(), size, KIND=kind, BLOCK=BLOCK)
    return y


def gated_backward(grad: Tensor, gate_up: Tensor, kind: str) -> Tensor:
    """Return the gradient of gate_up; both arguments are contiguous."""
    result, grid = torch.empty_like(gate_up), (-(-grad.numel() // BLOCK),)
    launch(gated_backward_kernel, grid, grad, gate_up, result, grad.numel(), grad.size(-1), KIND=kind, BLOCK=BLOCK)
    return result
