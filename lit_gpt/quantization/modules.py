"""Layers whose weights are kept in a quantized format."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_gpt.kernels import products
from lit_gpt.kernels.cuda.dequantize import QuantizedWeight
from lit_gpt.kernels.cuda.gemv import FEW_ROWS, Epilogue, gemv
from lit_gpt.kernels.cuda.launch import serves
from lit_gpt.kernels.linear import arithmetic
from lit_gpt.kernels.policy import bound_to_policy
from lit_gpt.quantization.formats import FORMATS, Tensors, decode, dequantized_chunks, encode


class Quantized(nn.Module):
    """Holds the tensors of a format in the place of `module.weight` (rows, columns), on its device.

    They are filled from the weight, unless that is on the meta device and has no contents yet.
    """

    weight: nn.Parameter  # the codes
    scale: nn.Parameter  # in int8 and int4

    def __init__(self, module: nn.Linear | nn.Embedding, format: str) -> None:
        super().__init__()
        weight = module.weight
        self.format, (self.rows, self.columns) = format, weight.shape
        self.dequantized_cache: Tensor | None = None  # set by `keep_dequantized` while it lasts
        for key, (shape, dtype) in FORMATS[format].layout(*weight.shape).items():
            new = torch.empty(shape, dtype=dtype or weight.dtype, device=weight.device)
            self.register_parameter(key, nn.Parameter(new, requires_grad=False))
        self.keys = [key for key, _ in self.named_parameters()]
        if not weight.is_meta:
            for key, tensor in encode(weight, format, weight.dtype).items():
                self.get_parameter(key).copy_(tensor)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight (rows, columns) in `dtype`."""
        cached = self.dequantized_cache
        if cached is not None and cached.dtype == dtype:
            return cached
        return decode({key: self.get_parameter(key) for key in self.keys}, self.format, self.columns, dtype)

    def for_cuda(self) -> QuantizedWeight:
        """Return the weight as the kernels of lit_gpt.kernels.cuda read it."""
        tensors = {key: self.get_parameter(key).detach() for key in self.keys}
        return FORMATS[self.format].for_cuda(tensors, self.columns)

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.columns}, {self.format}"


class QuantizedLinear(Quantized):
    """A linear layer whose weight is quantized and does not train."""

    def __init__(self, linear: nn.Linear, format: str) -> None:
        super().__init__(linear, format)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return quantized_linear(x, self)


def unpacked(layer: Quantized) -> Tensors:
    """Return the tensors of a layer's format, unpacked."""
    return FORMATS[layer.format].unpack({key: layer.get_parameter(key).detach() for key in layer.keys})


class QuantizedEmbedding(Quantized):
    """An embedding in int8 with a scale for each token. Its output has the scale's dtype."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__(embedding, "int8")

    def forward(self, idx: Tensor) -> Tensor:
        return self.weight[idx].to(self.scale.dtype) * self.scale[idx].unsqueeze(-1)


def quantized_linear(x: Tensor, layer: QuantizedLinear) -> Tensor:
    """Return x W^T + bias for x (..., in_features), in x's dtype.

    Many rows, as in training and of a prompt, are worth a dequantization. A single one, as in decoding, is bound by
    reading the weight, which the native decoding step, kernels on CUDA, and in int8 the compiled step do without
    dequantizing it first.
    """
    if layer.dequantized_cache is None and products.supports_linear(x, layer.weight):
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return products.linear(x, *FORMATS[layer.format].for_kernels(unpacked(layer)), bias)
    if (dtype := arithmetic(x.device, x.dtype)) != x.dtype:
        return quantized_linear(x.to(dtype), layer).to(x.dtype)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        return _QuantizedLinear.apply(x, layer, bias)
    if torch.compiler.is_compiling() and layer.format == "int8":  # which makes one loop of it, over the codes
        y = F.linear(x.float(), layer.weight.float()) * layer.scale.float()
        return (y if layer.bias is None else y + layer.bias).to(x.dtype)
    if layer.dequantized_cache is not None:
        return F.linear(x, layer.dequantize(x.dtype), bias)
    if serves(x):
        if x.numel() > FEW_ROWS * x.size(-1):
            return F.linear(x, layer.dequantize(x.dtype), bias)
        rows = x.reshape(-1, x.size(-1)).contiguous()
        return gemv(rows, layer.for_cuda(), Epilogue(bias)).view(*x.shape[:-1], -1)
    chunks = dequantized_chunks(unpacked(layer), FORMATS[layer.format], layer.columns, x.dtype)
    outputs = [F.linear(x, weight, None if bias is None else bias[span]) for span, weight in chunks]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


class _QuantizedLinear(torch.autograd.Function):
    """Keeps nothing but the layer: the backward pass dequantizes its weight again. The layer gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear, bias: Tensor | None) -> Tensor:
        ctx.dequantize = bound_to_policy(layer.dequantize)
        return F.linear(x, layer.dequantize(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.dequantize(grad.dtype), None, None


@contextmanager
def keep_dequantized(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Keep the weights of a module's quantized layers dequantized while it is used several times."""
    layers = [layer for layer in module.modules() if isinstance(layer, QuantizedLinear)]
    for layer in layers:
        layer.dequantized_cache = layer.dequantize(dtype)
    try:
        yield
    finally:
        for layer in layers:
            layer.dequantized_cache = None


def weight_of(module: nn.Module) -> Tensor:
    """Return a layer's weight as it is, or dequantized to float32 if it is quantized."""
    return module.dequantize() if isinstance(module, Quantized) else module.get_parameter("weight").detach()


def is_quantized(model: nn.Module) -> bool:
    """Return whether any layer of the model is quantized."""
    return any(isinstance(module, Quantized) for module in model.modules())


def count_parameters(model: nn.Module) -> int:
    """Count the parameters that the model would have without quantization."""
    counts: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if isinstance(module, Quantized) and key in module.keys:
                counts[parameter] = module.rows * module.columns if key == "weight" else 0
            else:
                counts[parameter] = parameter.numel()
    return sum(counts.values())
