"""The step of one more token of a few rows on a CPU, as a list of operations of lit_gpt/kernels/cpp/decode.cpp.

The list is made from the model as it stands, by walking its modules, whatever wraps them included, and holds pointers
to its weights. Running it is one call: no operator of torch, and no compiling.
"""

import ctypes
import sys
import weakref
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from lit_gpt.generation.sequence import DecodingRow
from lit_gpt.generation.steps.tape import TYPES, Tape, Unsupported, changed, check_places, versions
from lit_gpt.kernels import build
from lit_gpt.kernels.ops import quantized_format
from lit_gpt.model.gpt import GPT
from lit_gpt.model.kv_cache import AttentionCache, KVCache, LayerCache, StateCache
from lit_gpt.quantization.formats import FORMATS
from lit_gpt.quantization.modules import QuantizedLinear, unpacked

MOST = sys.maxsize  # places of a cache without keys: states have room for any number of tokens


class NativeTape(Tape):
    """Hands the operations to the library, which keeps pointers to their tensors."""

    gates_and_states = True

    def __init__(self, library: ctypes.CDLL, model: GPT, n: int) -> None:
        self.library, self.kept = library, list[Tensor]()
        self.handle = library.tape_new()
        weakref.finalize(self, library.tape_free, self.handle)
        super().__init__(model, n)

    def use(self, cache: KVCache) -> None:
        """Add to this cache, to its first places, from now on."""
        self.cache = cache
        self.places = min((layer.k.size(2) for layer in cache if isinstance(layer, AttentionCache)), default=MOST)
        pointers = [None if tensor is None else tensor.data_ptr() for layer in cache for tensor in pair(layer)]
        self.pointers = (ctypes.c_void_p * len(pointers))(*pointers)

    def run(self, tokens: list[int], positions: list[int]) -> Tensor:
        """Add a token to each row, at its position; return the logits (rows, padded_vocab_size)."""
        check_places(self.model, self.places, tokens, positions)
        rope = self.model.rope
        updates = self.choice.addresses.tolist() if self.choice else [0] * len(tokens)
        extended = [int(rope.is_long(position + 1)) for position in positions]
        rows = torch.tensor(list(zip(tokens, positions, updates, extended, strict=True)))
        threads = torch.get_num_threads()
        self.library.tape_run(self.handle, rows.data_ptr(), len(rows), self.pointers, self.places, threads)
        return self.logits[: len(tokens)]

    def add(self, operation: str, *arguments: Tensor | float | None) -> None:
        getattr(self.library, f"tape_{operation}")(self.handle, *map(self.plain, arguments))

    def add_product(self, y: Tensor, x: Tensor, layer: nn.Linear | QuantizedLinear) -> None:
        bias = None if layer.bias is None else layer.bias.float()
        fast = self.dtype == torch.bfloat16  # whose rounding is mostly coarser than that of fast products
        self.add("linear", y, x, layer.out_features, layer.in_features, *self.weight(layer), bias, fast)

    def weight(self, layer: nn.Linear | QuantizedLinear) -> tuple[int | Tensor | None, ...]:
        """Return the format and weight, and scale, zero and pairs if the layer is quantized."""
        if isinstance(layer, nn.Linear):
            return self.type(layer.weight), layer.weight, None, None, None
        codes, scale, *rest = FORMATS[layer.format].for_kernels(unpacked(layer))
        return quantized_format(codes, scale), codes, scale, *rest

    def plain(self, argument: Tensor | float | None) -> Any:
        """Return an argument as ctypes takes it: a tensor by its address, and it is kept alive."""
        if isinstance(argument, Tensor):
            if not argument.is_contiguous():
                raise Unsupported("a tensor that is not contiguous")
            self.kept.append(argument)
            return argument.data_ptr()
        return argument


def pair(layer: LayerCache) -> tuple[Tensor | None, ...]:
    """Return a layer's keys and values; or its state, None where there is none, and a convolution's tail."""
    tensors = layer.tensors if isinstance(layer, StateCache) else layer.keys_values
    return (None, *tensors)[-2:]


class NativeStep:
    """Takes a Step by the operations of a tape, with the logits of lit_gpt.generation.sequence.eager_step.

    Weights are read where they lie; what is attached to a model, and small things like norms, are copied, and copied
    again when they have changed, which is looked at when other rows are continued than before.

    Args:
        n: rows that are expected; more can follow.

    Raises:
        Unsupported: there is no kernel for some part of the model, or no compiler to make kernels.
    """

    def __init__(self, model: GPT, n: int = 1) -> None:
        refuse(model)  # before anything is compiled
        library = build.library("decode")
        if library is None:
            raise Unsupported("no compiler")
        self.library, self.model = library, model
        self.slots: list[KVCache] = []  # of the rows of the last call, as are the lengths
        self.lengths: list[int] = []
        self.record(n)

    def record(self, n: int) -> None:
        refuse(self.model)
        self.tape, self.seen = NativeTape(self.library, self.model, n), versions(self.model)

    def __call__(self, rows: list[DecodingRow], cache: KVCache) -> Tensor:
        """Return float32 logits (len(rows), padded_vocab_size), which the next call overwrites."""
        slots, lengths = [row.cache for row in rows], [len(row.ids) for row in rows]
        if lengths != [length + 1 for length in self.lengths] or not all(map(is_, slots, self.slots)):
            outdated = self.model.training or changed(self.seen, versions(self.model))
            if outdated or self.tape.n < len(rows):
                self.record(max(len(rows), cache[0].rows))
            self.tape.use(rows[0].cache if len(rows) == 1 else cache)
        self.slots, self.lengths = slots, lengths
        for state in (layer for row in rows for layer in row.cache if isinstance(layer, StateCache)):
            state.length = 0  # Ctrl-C may come before the new token counts: such a state counts for nothing then
        logits = self.tape.run([row.ids[-1] for row in rows], [length - 1 for length in lengths])
        for row, length in zip(rows, lengths, strict=True):
            row.cache[0].uses_long_rope = self.model.rope.is_long(length)
            for layer in row.cache:
                layer.length = length
        return logits


def refuse(model: GPT) -> None:
    """Raise Unsupported unless the operations serve the model's device, dtype and mode."""
    if model.wte.weight.device.type != "cpu" or model.dtype not in TYPES or model.training:
        raise Unsupported("a device, dtype or mode")
