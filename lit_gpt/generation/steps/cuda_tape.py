"""The operations of a decoding step on CUDA: kernels in Triton on fixed buffers, made once from a model as it stands.

What follows a product in a decoder becomes a part of it where nothing lies between: activations, gates, and additions
to the residual stream; and so does an RMSNorm before it that nothing else reads. Rotation, cache and attention are one
kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_gpt.generation.steps.tape import TYPES, Tape, Unsupported
from lit_gpt.kernels.cuda.decoding import attention, rows
from lit_gpt.kernels.cuda.decoding.attention import Heads
from lit_gpt.kernels.cuda.dequantize import QuantizedWeight
from lit_gpt.kernels.cuda.gemv import Epilogue, InputNorm, gemv
from lit_gpt.kernels.declarations import ACTIVATION_NUMBERS
from lit_gpt.kernels.functional import ACTIVATIONS
from lit_gpt.model.gpt import GPT
from lit_gpt.model.kv_cache import AttentionCache, KVCache
from lit_gpt.quantization.modules import QuantizedLinear

NAMES = {number: name for name, number in ACTIVATION_NUMBERS.items()}


@dataclass
class Product:
    """A product of the buffer x, normed perhaps, with a weight, and what follows it, into the buffer y."""

    y: Tensor
    x: Tensor
    weight: Tensor | QuantizedWeight
    epilogue: Epilogue
    dtype: torch.dtype
    norm: InputNorm | None = None

    @property
    def touched(self) -> tuple[Tensor, ...]:
        """Return the buffers that it reads and writes."""
        return self.x, self.y

    @property
    def plain(self) -> bool:
        """Return whether nothing but a bias follows it yet."""
        return not (self.epilogue.activation or self.epilogue.gated or self.epilogue.residual is not None)

    def __call__(self, n: int) -> None:
        residual = None if self.epilogue.residual is None else self.epilogue.residual[:n]
        gemv(self.x[:n], self.weight, self.epilogue._replace(residual=residual), self.y[:n], self.dtype, self.norm)


@dataclass
class Call:
    """Another operation, of so many rows, which reads and writes the buffers `touched`."""

    function: Callable[[int], Any]
    touched: tuple[Tensor, ...]

    def __call__(self, n: int) -> None:
        self.function(n)


@dataclass
class Norm(Call):
    """A norm, which writes the first buffer that it touches.

    Attributes:
        within: what a product can read in place of its result, the rows (n, size) and how to norm them, if it can.
    """

    within: tuple[Tensor, InputNorm] | None

    def writes_anew(self, buffer: Tensor) -> bool:
        y, x = self.touched
        return same_memory(y, buffer) and not same_memory(x, buffer)


class CudaTape(Tape):
    """Records the operations, and runs those of the first rows.

    Attributes:
        tokens, positions: int64 (n,), of the new token of each row; a row at -1 has none.
        addresses: int64 (n,), see lit_gpt.methods.decoding_tape.RowChoice.
        longest: that positions are less than, by which attention shares its work.
        limit: that model and cache have room for.
        operations: in their order.
    """

    types = {**TYPES, torch.float16: -1}

    def __init__(self, model: GPT, n: int) -> None:
        zeros = partial(torch.zeros, dtype=torch.int64, device=model.wte.weight.device)
        self.tokens, self.positions, self.addresses, self.places = zeros(n), zeros(n), zeros(n), zeros(1)
        self.pointers = zeros(2 * len(model.h))
        self.longest, self.limit = 0, 0
        self.operations: list[Product | Call] = []
        self.rotation: tuple[Tensor, tuple[Tensor, Tensor]] | None = None  # of a product that is not rotated yet
        super().__init__(model, n)
        self.norm_within_products()

    def use(self, cache: KVCache) -> None:
        """Add to this cache, to its first places, from now on."""
        layers = [layer for layer in cache if isinstance(layer, AttentionCache)]
        pointers = [tensor.data_ptr() for layer in layers for tensor in (layer.k, layer.v)]
        if any(pointer % 16 for pointer in pointers):
            raise Unsupported("a cache that is not aligned")
        room = layers[0].k.size(2)
        self.limit = min(room, self.model.config.block_size) if self.model.wpe is not None else room
        self.pointers.copy_(torch.tensor(pointers), non_blocking=True)
        self.places.fill_(room)

    def run(self, n: int) -> Tensor:
        """Take the step of the first n rows; return their logits, float32 (n, padded_vocab_size)."""
        for operation in self.operations:
            operation(n)
        return self.logits[:n]

    def add(self, operation: str, *arguments: Tensor | float | None) -> None:
        record = getattr(self, f"add_{operation}", None)
        if record is None:
            raise Unsupported(f"the operation {operation}")
        record(*arguments)

    def call(self, function: Callable[[int], Any], *touched: Tensor) -> None:
        self.operations.append(Call(function, touched))

    def last_product(self, y: Tensor) -> Product | None:
        """Return the operation before, if it is a product into y that nothing follows yet."""
        last = self.operations[-1] if self.operations else None
        return last if isinstance(last, Product) and last.y is y and last.plain else None

    def add_product(self, y: Tensor, x: Tensor, layer: nn.Linear | QuantizedLinear) -> None:
        weight = layer.for_cuda() if isinstance(layer, QuantizedLinear) else layer.weight.detach()
        if not (weight.codes if isinstance(weight, QuantizedWeight) else weight).is_contiguous():
            raise Unsupported("a weight that is not contiguous")
        if isinstance(layer, nn.Linear):
            self.type(layer.weight)
        bias = None if layer.bias is None else layer.bias.detach()
        self.operations.append(Product(y, x, weight, Epilogue(bias), self.dtype))

    def add_add(self, y: Tensor, n: int, x: Tensor, factor: float) -> None:
        for i in reversed(range(len(self.operations))):
            operation = self.operations[i]
            if isinstance(operation, Product) and operation.y is x:
                if operation.plain:
                    residual = operation.epilogue._replace(residual=y, scale=factor)
                    self.operations[i] = replace(operation, y=y, epilogue=residual)
                    return
                break
            if any(same_memory(touched, y) or same_memory(touched, x) for touched in operation.touched):
                break
        self.call(lambda m: y[:m].add_(x[:m], alpha=factor), y, x)

    def add_activate(self, y: Tensor, n: int, kind: int) -> None:
        if product := self.last_product(y):
            product.epilogue = product.epilogue._replace(activation=NAMES[kind])
        else:
            function = ACTIVATIONS[NAMES[kind]]
            self.call(lambda m: y[:m].copy_(function(y[:m])), y)

    def add_gate(self, y: Tensor, gate_up: Tensor, n: int, kind: int) -> None:
        if product := self.last_product(gate_up):
            product.y, product.epilogue = y, product.epilogue._replace(activation=NAMES[kind], gated=True)
        else:
            function = ACTIVATIONS[NAMES[kind]]
            self.call(lambda m: torch.mul(function(gate_up[:m, :n]), gate_up[:m, n:], out=y[:m]), y, gate_up)

    def add_embed(
        self, y: Tensor, table: Tensor, kind: int, scale: Tensor | None, size: int, factor: float, by_position: bool
    ) -> None:
        entries = self.positions if by_position else self.tokens
        table = table.detach()
        self.call(lambda m: rows.embed(y[:m], entries[:m], table, scale, factor, by_position), y)

    def add_norm(
        self, y: Tensor, y_stride: int, x: Tensor, x_stride: int, parts: int, size: int, weight: Tensor | None,
        bias: Tensor | None, stride: int, eps: float, offset: float, centered: bool,
    ) -> None:  # fmt: skip
        if self.rotation is not None:
            raise Unsupported("norms of rotated queries")

        def compute(m: int) -> None:
            rows.norm(m, y, y_stride, x, x_stride, parts, size, weight, bias, stride, eps, offset, centered)

        within = None
        if parts == 1 and x_stride == size and weight is not None and bias is None and not centered:
            within = x.as_strided((self.n, size), (size, 1)), InputNorm(weight + offset, eps)
        self.operations.append(Norm(compute, (y, x), within))

    def norm_within_products(self) -> None:
        """Make norms a part of the products that follow them, where nothing else reads what they write."""
        for i in reversed(range(len(self.operations) - 1)):
            norm, product = self.operations[i : i + 2]
            if not (isinstance(norm, Norm) and norm.within and isinstance(product, Product)):
                continue
            (x, how), y = norm.within, norm.touched[0]
            if same_memory(product.x, y) and not same_memory(product.y, x) and not self.is_read(y, i + 2):
                self.operations[i : i + 2] = [replace(product, x=x, norm=how)]

    def is_read(self, buffer: Tensor, start: int) -> bool:
        """Return whether an operation from `start` on reads what the buffer holds before."""
        for operation in self.operations[start:]:
            if isinstance(operation, Norm) and operation.writes_anew(buffer):
                return False
            if any(same_memory(touched, buffer) for touched in operation.touched):
                return True
        return False

    def add_scale(self, y: Tensor, n: int, scale: Tensor, shift: Tensor) -> None:
        self.call(lambda m: y[:m].add_(shift).mul_(scale), y)

    def add_finish(self, y: Tensor, n: int, divisor: float, softcap: float) -> None:
        self.call(lambda m: y[:m].div_(divisor), y)
        if softcap:
            self.call(lambda m: y[:m].div_(softcap).tanh_().mul_(softcap), y)

    # attention

    def add_angles(
        self, cos: Tensor, sin: Tensor, frequencies: Tensor, n: int, kinds: int, factor: float, kind: int
    ) -> None:
        frequencies, original = frequencies.to(self.device), self.model.rope.original or 0

        def compute(m: int) -> None:
            positions = self.positions[:m].clamp(min=0).unsqueeze(1)
            each = frequencies[0]
            if kinds > 1:
                each = torch.where(positions + 1 > original, frequencies[1], each)
            angles = positions.float() * each
            cos[:m].copy_((angles.cos() * factor).to(self.dtype))
            sin[:m].copy_((angles.sin() * factor).to(self.dtype))

        self.call(compute, cos, sin)

    def add_rotate(self, x: Tensor, width: int, heads: int, size: int, cos: Tensor, sin: Tensor, n: int) -> None:
        self.rotation = x, (cos, sin)  # by what attends

    def add_append(self, qkv: Tensor, *_: int) -> None:
        """Leave it to what attends."""

    def add_attend(
        self, y: Tensor, qkv: Tensor, heads: int, groups: int, size: int, layer: int, kind: int, scale: float,
        softcap: float, slopes: Tensor | None, window: int,
    ) -> None:  # fmt: skip
        slopes = None if slopes is None else slopes.to(self.device)
        which = Heads(heads, groups, size, scale, softcap, window, slopes, self.rotation[1] if self.rotation else None)
        self.attended, self.rotation = which, None
        pointers = self.pointers[2 * layer : 2 * layer + 2]

        def attend(m: int) -> None:
            turned = which.rotation and (which.rotation[0][:m], which.rotation[1][:m])
            one = qkv[:m], y[:m], self.positions[:m], pointers, self.places
            attention.attend(*one, replace(which, rotation=turned), self.dtype, self.longest)

        self.call(attend, y, qkv)

    def add_attend_prefix(
        self, y: Tensor, qkv: Tensor, heads: int, groups: int, size: int, k: Tensor, v: Tensor, length: int,
        scale: float, softcap: float, gate: Tensor,
    ) -> None:  # fmt: skip
        which = self.attended
        self.call(lambda m: attention.attend_prefix(qkv, y, m, k, v, length, gate, which), y, qkv)

    # low-rank updates

    def add_lora_down(self, low: Tensor, x: Tensor, ranks: int, columns: int, A: Tensor, kind: int) -> None:
        self.operations.append(Product(low, x, A, Epilogue(), self.dtype))

    def add_lora_up(
        self, y: Tensor, n: int, low: Tensor, ranks: int, first: int, B: Tensor, kind: int, rank: int, start: int,
        stop: int,
    ) -> None:  # fmt: skip
        self.call(lambda m: rows.lora_up(m, y, low, first, B, start, stop), y, low)

    def add_row_lora_down(self, low: Tensor, x: Tensor, ranks: int, columns: int, layer: int, kind: int) -> None:
        down = partial(rows.row_lora_down, layer=layer, dtype=self.dtype)
        self.call(lambda m: down(low[:m], x[:m], self.addresses[:m]), low, x)

    def add_row_lora_up(self, y: Tensor, n: int, low: Tensor, ranks: int, layer: int, kind: int) -> None:
        up = partial(rows.row_lora_up, layer=layer, dtype=self.dtype)
        self.call(lambda m: up(y[:m], low[:m], self.addresses[:m]), y, low)


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are of one buffer."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
