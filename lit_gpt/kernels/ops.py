"""The C++ kernels of lit_gpt/kernels/cpp as torch operators, whose shapes FakeTensorMode knows as well.

lit_gpt.kernels.functional chooses between them and torch's formulas; `supports` says which tensors they serve.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.kernels import build, trials
from lit_gpt.kernels.declarations import FORMAT_NUMBERS
from lit_gpt.kernels.policy import policy

SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "f32"}
GATED_ACTIVATIONS = ("silu", "gelu_tanh")  # those of layers.cpp
_operators = torch.library.Library("lit_gpt", "FRAGMENT")


def supports(operation: str, sizes: tuple[int, ...], *tensors: Tensor) -> bool:
    """Return whether a kernel serves tensors like these: on the CPU, all in bfloat16 or all in float32.

    There are none while torch.compile traces, which makes its own.

    Args:
        operation, sizes: as lit_gpt.kernels.trials knows them.
    """
    first = tensors[0]
    alike = all(x.dtype == first.dtype for x in tensors)
    # the choice last: see `arithmetic`
    return alike and supports_on(first.device, first.dtype) and trials.chosen(operation, first.dtype, *sizes)


def supports_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether there are kernels for tensors of this dtype on this device."""
    return device.type == "cpu" and dtype in SUFFIXES and not torch.compiler.is_compiling() and available()


def available() -> bool:
    """Return whether the policy admits C++ kernels and they could be compiled."""
    return policy().cpp and _compiled()


@functools.cache
def _compiled() -> bool:
    return all(build.library(name) is not None for name in build.OPERATORS)


@functools.cache
def _kernel(library: str, name: str, dtype: torch.dtype) -> Any:
    return getattr(build.library(library), f"{name}_{SUFFIXES[dtype]}")


def call(library: str, name: str, like: Tensor, *arguments: Any) -> None:
    """Call the kernel for the dtype of `like`; tensors become pointers."""
    _kernel(library, name, like.dtype)(*[x.data_ptr() if isinstance(x, Tensor) else x for x in arguments])


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = _operators.define(schema)
        _operators.impl(name, function, "CPU")
        torch.library.register_fake(f"lit_gpt::{name}", fake, lib=_operators)
        return getattr(torch.ops.lit_gpt, name).default

    return register


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def rows(x: Tensor) -> int:
    return x.numel() // x.size(-1)


def _norm_results(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    return _like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@operator("rms_norm(Tensor x, Tensor weight, float eps, float offset) -> (Tensor, Tensor)", _norm_results)
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """Return the normed x, and the inverse of each row's rms, float32 (..., 1)."""
    y, inverse = _norm_results(x, weight, eps, offset)
    call("layers", "rms_norm", x, rows(x), x.size(-1), x, weight, eps, offset, y, inverse)
    return y, inverse


@operator(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor inverse, float offset) -> Tensor",
    lambda grad, *_: _like(grad),
)
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, offset: float) -> Tensor:
    x_grad = _like(grad)
    call("layers", "rms_norm_backward", x, rows(x), x.size(-1), grad, x, weight, inverse, offset, x_grad)
    return x_grad


def supports_gated(gate_up: Tensor, activation: str) -> bool:
    return activation in GATED_ACTIVATIONS and supports("gated " + activation, (gate_up.size(-1),), gate_up)


def _half(gate_up: Tensor, kind: int) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.size(-1) // 2)


@operator("gated(Tensor gate_up, int kind) -> Tensor", _half)
def gated(gate_up: Tensor, kind: int) -> Tensor:
    """Return activation(gate) * up; `kind` is one of ACTIVATION_NUMBERS."""
    y = _half(gate_up, kind)
    call("layers", "gated", y, rows(y), y.size(-1), kind, gate_up, y)
    return y


@operator("gated_backward(Tensor grad, Tensor gate_up, int kind) -> Tensor", lambda grad, x, kind: _like(x))
def gated_backward(grad: Tensor, gate_up: Tensor, kind: int) -> Tensor:
    x_grad = _like(gate_up)
    call("layers", "gated_backward", grad, rows(grad), grad.size(-1), kind, grad, gate_up, x_grad)
    return x_grad


@operator(
    "rotate(Tensor x, Tensor cos, Tensor sin, int heads, int head_size, float sign) -> Tensor",
    lambda x, *_: _like(x),
)
def rotate(x: Tensor, cos: Tensor, sin: Tensor, heads: int, head_size: int, sign: float) -> Tensor:
    """Return x (rows, ...) rotated by angles (rows, rope_n_elem)."""
    y = _like(x)
    sizes = rows(x), x.size(-1) // head_size, heads, head_size, cos.size(-1) // 2
    call("layers", "rotate", x, *sizes, x, cos, sin, sign, y)
    return y


@operator(
    "cross_entropy_(Tensor(a!) logits, Tensor labels) -> Tensor",
    lambda logits, _: logits.new_empty(len(logits), dtype=torch.float32),
)
def cross_entropy_(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each row of logits (n, size), float32 (n,), and make of them its gradient.

    Raises:
        IndexError: a label, int64 (n,), is none of the logits' columns.
    """
    if len(labels) and not 0 <= labels.min() <= labels.max() < logits.size(1):
        raise IndexError(f"labels: expected 0 to {logits.size(1) - 1}, got {labels.min()} to {labels.max()}")
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    call("layers", "cross_entropy", logits, len(logits), logits.size(1), logits, labels, losses)
    return losses


def supports_convolution(x: Tensor, tail: Tensor) -> bool:
    """Return whether kernels convolve x (B, T, channels), perhaps a part of wider rows, behind a tail that is fixed."""
    rows = x.stride(2) == 1 and (len(x) == 1 or x.stride(0) == x.size(1) * x.stride(1))
    return rows and not tail.requires_grad and supports("convolution", (x.size(2), tail.size(1) + 1), x, tail)


_CONVOLUTION = "Tensor x, Tensor tail, Tensor weight"
_BLOCKS = 16  # parts of the rows whose gradients of the weight are summed apart


def _convolution_sizes(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    return rows(x), x.size(1), x.size(2), len(weight)


@operator(f"convolve({_CONVOLUTION}, Tensor? bias, Tensor? positions) -> Tensor", lambda x, *_: _like(x))
def convolve(x: Tensor, tail: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor | None) -> Tensor:
    """Return the causal convolution of x, see lit_gpt.kernels.convolution.

    Args:
        weight: float32 (size, channels): of a token itself, of the one before, and so on.
        bias: float32 (channels,).
    """
    y = _like(x)
    sizes = _convolution_sizes(x, weight)
    call("layers", "convolve", x, *sizes, x, x.stride(1), tail, positions, weight, bias, y)
    return y


def _convolution_grads(grad: Tensor, x: Tensor, tail: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(grad), weight.new_empty(_BLOCKS, *weight.shape)


@operator(f"convolve_backward(Tensor grad, {_CONVOLUTION}, Tensor? positions) -> (Tensor, Tensor)", _convolution_grads)
def convolve_backward(
    grad: Tensor, x: Tensor, tail: Tensor, weight: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, and parts whose sum over the first dimension is the weight's."""
    grads = _convolution_grads(grad, x, tail, weight)
    given = x, x.stride(1), tail, positions, weight, grad, _BLOCKS
    call("layers", "convolve_backward", x, *_convolution_sizes(x, weight), *given, *grads)
    return grads


@operator("drop(Tensor x, Tensor keys, int kept) -> Tensor", lambda x, keys, kept: _like(x))
def drop(x: Tensor, keys: Tensor, kept: int) -> Tensor:
    """Return x (T, size), contiguous, with zero where an element is dropped, see lit_gpt.kernels.dropout."""
    y = _like(x)
    call("lora", "drop", x, len(x), x.size(1), x, keys, kept, y)
    return y


def supports_lora(y: Tensor, x: Tensor, B: Tensor, keys: Tensor | None, parts: list[tuple[int, int]]) -> bool:
    whole = not any(n % 8 for part in parts for n in part) and x.size(-1) % 8 == 0
    sizes = x.size(-1), len(B), len(parts), B.size(1), int(keys is not None)
    return whole and y.is_contiguous() and x.is_contiguous() and supports("LoRA", sizes, y, x)


def _low(y: Tensor, x: Tensor, A: Tensor, B: Tensor, *_: Any) -> Tensor:
    r = B.size(1)
    return x.new_empty(x.size(0), A.size(0) // r * _padded(r), dtype=torch.float32)


def _padded(r: int) -> int:
    return -(-r // 8) * 8


def _pad_ranks(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in float32, with ranks of zeros added up to a multiple of 8."""
    A, B, r = A.float(), B.float(), B.size(1)
    if r % 8 == 0:
        return A.contiguous(), B.contiguous()
    more = _padded(r) - r
    return F.pad(A.unflatten(0, (-1, r)), (0, 0, 0, more)).flatten(0, 1), F.pad(B, (0, more))


def _int_array(values: list[int]) -> Any:
    return (ctypes.c_int * len(values))(*values)


_LORA = "Tensor A, Tensor B, Tensor? keys, int kept, int[] starts, int[] stops, float factor"


@operator(f"lora_(Tensor(a!) y, Tensor x, {_LORA}) -> Tensor", _low)
def lora_(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, keys: Tensor | None, kept: int,
    starts: list[int], stops: list[int], factor: float,
) -> Tensor:  # fmt: skip
    """Add the update to y in place; return dropout(x) A^T, float32.

    Args:
        keys: int64 (T,), by which elements are dropped, see lit_gpt.kernels.dropout; None: none are.
        kept: the probability to stay, in 65536ths.
    """
    low = _low(y, x, A, B)
    A, B = _pad_ranks(A, B)
    parts = len(starts), B.size(1), _int_array(starts), _int_array(stops)
    weights = A, B, len(B), factor, keys, kept
    call("lora", "lora", x, len(x), x.size(1), x, *weights, *parts, low, y, y.size(1))
    return low


def _lora_grads(grad: Tensor, x: Tensor | None, A: Tensor, B: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    x_grad = grad.new_empty(len(grad), A.size(1))
    return x_grad, A.new_empty(0) if x is None else torch.empty_like(A), torch.empty_like(B)


@operator(f"lora_backward(Tensor grad, Tensor? x, {_LORA}, Tensor low) -> (Tensor, Tensor, Tensor)", _lora_grads)
def lora_backward(
    grad: Tensor, x: Tensor | None, A: Tensor, B: Tensor, keys: Tensor | None, kept: int,
    starts: list[int], stops: list[int], factor: float, low: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, through the update alone, of A, which is empty without x, and of B."""
    r, (wide_A, wide_B) = B.size(1), _pad_ranks(A, B)
    grads = x_grad, A_grad, B_grad = _lora_grads(grad, x, wide_A, wide_B)
    parts = len(starts), wide_B.size(1), _int_array(starts), _int_array(stops)
    weights = wide_A, wide_B, len(B), factor, keys, kept
    sizes = len(grad), A.size(1)
    call("lora", "lora_backward", grad, *sizes, grad, x, *weights, *parts, low, grad.size(1), *grads)
    if r % 8 and x is not None:
        A_grad = A_grad.unflatten(0, (len(starts), -1))[:, :r].flatten(0, 1)
    return x_grad, A_grad.to(A.dtype), B_grad[:, :r].to(B.dtype)


class _Heads(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_long) for name in ("batch", "head", "token"))]

    @classmethod
    def of(cls, x: Tensor) -> Any:
        return ctypes.byref(cls(x.data_ptr(), *x.stride()[:3]))


class _Sizes(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("batch", "heads", "groups", "size", "samples")),
        ("offsets", ctypes.c_void_p), ("scale", ctypes.c_float),
        ("window", ctypes.c_int), ("before", ctypes.c_int),
    ]  # fmt: skip

    @classmethod
    def of(cls, q: Tensor, k: Tensor, scale: float, window: int, lengths: list[int]) -> Any:
        offsets = [0]
        for length in lengths:
            offsets.append(offsets[-1] + length)
        array = ctypes.cast(_int_array(offsets), ctypes.c_void_p)
        sizes = cls(
            q.size(0), q.size(1), k.size(1), q.size(3), len(lengths), array, scale, window, k.size(2) - q.size(2)
        )
        sizes.kept = array  # which lives as long as this
        return ctypes.byref(sizes)


def supports_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    sizes = q.size(-1), q.size(1) // k.size(1)
    return all(x.stride(-1) == 1 for x in (q, k, v)) and supports("attention", sizes, q, k, v)


def _by_token(x: Tensor, heads: int) -> Tensor:
    """Return memory for (B, heads, T, head_size), in which the heads of a token lie next to each other."""
    B, _, T, size = x.shape
    return x.new_empty(B, T, heads, size).transpose(1, 2)


def _attention_results(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _by_token(q, q.size(1)), q.new_empty(q.shape[:3], dtype=torch.float32)


@operator(
    "attention(Tensor q, Tensor k, Tensor v, float scale, int window, int[] lengths) -> (Tensor, Tensor)",
    _attention_results,
)
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Return y like q, and the logarithm of each query's sum of exponentials, float32 (B, n_head, T).

    Args:
        lengths: of the samples of k and v; of a single one, q may have the last queries alone.
    """
    y, log_sums = _attention_results(q)
    heads = (_Heads.of(x) for x in (q, k, v, y))
    call("attention", "attention", q, _Sizes.of(q, k, scale, window, lengths), *heads, log_sums)
    return y, log_sums


def _attention_grads(grad: Tensor, q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _by_token(q, q.size(1)), _by_token(k, k.size(1)), _by_token(k, k.size(1))


@operator(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor log_sums, float scale, int window, "
    "int[] lengths) -> (Tensor, Tensor, Tensor)",
    _attention_grads,
)
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, log_sums: Tensor, scale: float, window: int, lengths: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    grads = _attention_grads(grad, q, k)
    by_head = [q.new_empty(q.shape, dtype=torch.float32) for _ in range(2)]  # what keys and values get, not yet summed
    heads = (_Heads.of(x) for x in (q, k, v, grad))
    sizes = _Sizes.of(q, k, scale, window, lengths)
    call("attention", "attention_backward", q, sizes, *heads, log_sums, *map(_Heads.of, grads), *by_head)
    return grads


def quantized_format(codes: Tensor, scale: Tensor) -> int:
    """Return the number that products.h gives the format: int8, or 4 bits with scales of some dtype."""
    if codes.dtype == torch.int8:
        return FORMAT_NUMBERS["int8"]
    return FORMAT_NUMBERS["nibbles_float32" if scale.dtype == torch.float32 else "nibbles_bfloat16"]


def supports_dequantize(codes: Tensor, scale: Tensor) -> bool:
    """Return whether the kernels can read these codes and scales."""
    return codes.is_contiguous() and scale.dtype in SUFFIXES


@operator(
    "dequantize(Tensor codes, Tensor scale, Tensor? zero, Tensor? pairs, int columns, ScalarType dtype) -> Tensor",
    lambda codes, scale, zero, pairs, columns, dtype: codes.new_empty(len(codes), columns, dtype=dtype),
)
def dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor | None, pairs: Tensor | None, columns: int, dtype: torch.dtype
) -> Tensor:
    """Return the weight (rows, columns) of quantized codes, in `dtype`.

    Args:
        codes: int8 (rows, columns), or uint8 (rows, groups * 32) with two codes of 4 bits in each.
        scale: float32 (rows,), or of groups of 64 (rows, groups) in float32 or bfloat16, and so `zero`.
        pairs: float32 (256, 2), the values of the codes in each byte.
    """
    y = codes.new_empty(len(codes), columns, dtype=dtype)
    tensors = codes, scale, zero, pairs
    call("dequantize", "dequantize", y, quantized_format(codes, scale), *tensors, len(y), columns, y)
    return y
