"""The step of one token of one row on a CPU, as a list of operations of lit_gpt/native/decode.cpp.

The list is made from the model as it stands, by walking its modules, whatever wraps them included, and holds pointers
to its weights and to the cache. Running it is one call: no operator of torch, and no compiling.
"""

import ctypes
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from lit_gpt import native
from lit_gpt.adapter import AdapterPrompt
from lit_gpt.adapter_v2 import ScaledLinear, TrainedNorm
from lit_gpt.alibi import alibi_slopes
from lit_gpt.fused import ACTIVATIONS
from lit_gpt.lora import LoRALinear
from lit_gpt.loras import ManyLoRAs
from lit_gpt.model import (
    GPT,
    Block,
    CausalSelfAttention,
    GptNeoxMLP,
    KVCache,
    LayerCache,
    LayerNorms,
    QKNorm,
    RMSNorm,
    SwiGLU,
    UnitOffsetRMSNorm,
)  # fmt: skip
from lit_gpt.quantize import NF4, QuantizedEmbedding, QuantizedLinear, unpacked

TYPES = {torch.float32: 0, torch.bfloat16: 1}  # of decode.cpp's Format, like the next two
INT8, NIBBLES = 2, 3
KINDS = list(ACTIVATIONS)  # of its Activation


class Unsupported(Exception):
    """The model has a part for which there is no operation."""


class NativeStep:
    """The logits that follow one more token, like `model(idx, cache=cache, last=True)[:, -1]`. For one row.

    Weights are read where they lie; what is attached to a model, and small things like norms, are copied when an answer
    begins, that is, when the cache is another one or does not continue where the last step ended.

    Raises:
        Unsupported: there is no kernel for some part of the model, or no compiler to make kernels.
    """

    def __init__(self, model: GPT) -> None:
        if model.wte.weight.device.type != "cpu" or model.dtype not in TYPES or model.training:
            raise Unsupported("a device, dtype or mode")
        self.library = native.library("decode")
        if self.library is None:
            raise Unsupported("no compiler")
        self.model, self.next = model, 0
        self.record(model.kv_cache(1, 1))

    def record(self, cache: KVCache) -> None:
        self.tape, self.cache = Tape(self.library, self.model, cache), cache

    def __call__(self, idx: Tensor, cache: KVCache) -> Tensor:
        """idx: int64 (1, 1); returns float32 (1, padded_vocab_size), which the next call overwrites."""
        position = cache[0].length
        if cache is not self.cache or position != self.next:
            self.record(cache)
        self.tape.run(int(idx), position)
        for layer in cache:
            layer.length += 1
        cache[0].long, self.next = self.model.rope.is_long(position + 1), position + 1
        return self.tape.logits


class Tape:
    """The operations of a model's step with a cache; `logits` is where the result lies."""

    def __init__(self, library: ctypes.CDLL, model: GPT, cache: KVCache) -> None:
        self.library, self.model, self.cache = library, model, cache
        self.dtype, self.kept, self.buffers = model.dtype, [], {}
        library.tape_new.restype = ctypes.c_void_p
        self.handle = ctypes.c_void_p(library.tape_new())
        weakref.finalize(self, library.tape_free, self.handle)
        with torch.no_grad():
            self.logits = self.whole().unsqueeze(0)
        self.places = min(cache[0].k.size(2), model.config.block_size if model.wpe else cache[0].k.size(2))

    def run(self, token: int, position: int) -> None:
        if not (0 <= token < self.model.config.padded_vocab_size and position < self.places):
            raise IndexError(f"token {token} or position {position} is beyond what model and cache have room for")
        self.library.tape_run(self.handle, *map(ctypes.c_long, (token, position)), torch.get_num_threads())

    # what operations are made with

    def add(self, operation: str, *arguments: Tensor | float | None) -> None:
        getattr(self.library, f"tape_{operation}")(self.handle, *map(self.plain, arguments))

    def plain(self, argument: Tensor | float | None) -> Any:
        """An argument as C takes it; tensors by their address, for which they are kept."""
        if isinstance(argument, Tensor):
            if not argument.is_contiguous():
                raise Unsupported("a tensor that is not contiguous")
            self.kept.append(argument)
            return ctypes.c_void_p(argument.data_ptr())
        if argument is None:
            return ctypes.c_void_p(None)
        return ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_long(argument)

    def buffer(self, name: str, size: int) -> Tensor:
        """Float32 (size,), one for all layers."""
        if (name, size) not in self.buffers:
            self.buffers[name, size] = torch.zeros(size)
        return self.buffers[name, size]

    # the parts of a model

    def whole(self) -> Tensor:
        model, config = self.model, self.model.config
        x = self.buffer("x", config.n_embd)
        self.embed(x, model.wte, float(torch.tensor(config.embedding_scale, dtype=self.dtype)), by_position=False)
        if model.wpe is not None:
            self.embed(x, model.wpe, 1.0, by_position=True)
        rotations = self.rotations()
        for block, layer, rotation in zip(model.h, self.cache, rotations, strict=True):
            self.block(block, x, layer, rotation)
        logits = self.linear(model.lm_head, self.norm(model.ln_f, x, "n"), "logits")
        if config.logit_divisor != 1.0 or config.logit_softcap:
            self.add("finish", logits, len(logits), float(config.logit_divisor), float(config.logit_softcap or 0))
        return logits

    def embed(self, x: Tensor, table: nn.Module, factor: float, by_position: bool) -> None:
        expect(table, nn.Embedding, QuantizedEmbedding)
        codes = isinstance(table, QuantizedEmbedding)
        kind, scale = (INT8, table.scale.float()) if codes else (self.type(table.weight), None)
        self.add("embed", x, table.weight, kind, scale, len(x), factor, by_position)

    def rotations(self) -> list[tuple[Tensor, Tensor] | None]:
        """Cosine and sine of each layer, float32 (rope_n_elem / 2,), if it is rotated."""
        model, config, found = self.model, self.model.config, {}
        for rope in (model.rope, model.local_rope):
            frequencies = rope.frequencies if rope.original is None else rope.frequencies[int(self.cache[0].long)]
            n = len(frequencies)
            found[rope] = torch.zeros(n), torch.zeros(n)
            if n:
                factor = float(rope.attention_factor)
                self.add("angles", *found[rope], frequencies.float(), n, factor, TYPES[self.dtype])
        kinds = [found[model.rope if config.window(i) is None else model.local_rope] for i in range(config.n_layer)]
        return [None if i in config.unrotated_layers else kind for i, kind in enumerate(kinds)]

    def block(self, block: Block, x: Tensor, layer: LayerCache, rotation: tuple[Tensor, Tensor] | None) -> None:
        expect(block, Block)
        n_1 = self.norm(block.norm_1, x, "n_1")
        h = self.norm(block.post_norm_1, self.attention(block.attn, n_1, layer, rotation), "h")
        if not block.parallel:
            self.add("add", x, len(x), h, float(block.scale))
        n_2 = n_1 if block.norm_2 is None else self.norm(block.norm_2, x, "n_2")
        y = self.norm(block.post_norm_2, self.mlp(block.mlp, n_2), "y")
        if block.parallel:
            self.add("add", x, len(x), h, 1.0)
        self.add("add", x, len(x), y, 1.0 if block.parallel else float(block.scale))

    def attention(
        self, attn: CausalSelfAttention, x: Tensor, layer: LayerCache, rotation: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        expect(attn, CausalSelfAttention)
        heads, groups, size, scores = attn.n_head, attn.n_query_groups, attn.head_size, attn.scores
        qkv = self.linear(attn.qkv, x, "qkv")
        if attn.qk_norm is not None:
            self.qk_norm(attn.qk_norm, qkv, attn.sizes)
        if rotation is not None and len(rotation[0]):
            self.add("rotate", qkv, heads + groups, size, *rotation, len(rotation[0]))
        places, kind = layer.k.size(2), self.type(layer.k)
        self.add("append", qkv, heads, groups, size, layer.k, layer.v, places, kind)
        slopes = None
        if attn.alibi:  # as the model rounds them
            slopes = (alibi_slopes(heads) / scores.scale).to(self.dtype).float() * scores.scale
        y, sizes = self.buffer("heads", heads * size), (heads, groups, size)
        how = float(scores.scale), float(scores.softcap or 0)
        self.add("attend", y, qkv, *sizes, layer.k, layer.v, places, kind, *how, slopes, scores.window or 0, 0, None)
        if attn.prefix is not None:
            expect(attn.prefix, AdapterPrompt)
            _, k, v = attn.heads(attn.prefix.prompt.to(self.dtype).unsqueeze(0), rotation=None)
            k, v, gate = (tensor.float().contiguous() for tensor in (k, v, attn.prefix.gate.to(self.dtype)))
            self.add("attend", y, qkv, *sizes, k, v, k.size(2), TYPES[k.dtype], *how, None, 0, k.size(2), gate)
        return self.linear(attn.proj, y, "h")

    def qk_norm(self, norms: QKNorm, qkv: Tensor, sizes: tuple[int, ...]) -> None:
        expect(norms, QKNorm)
        for norm, part, width in zip((norms.q, norms.k), qkv.split(sizes), norms.widths, strict=False):
            self.norm(norm, part, None, len(part) // width)

    def mlp(self, mlp: nn.Module, x: Tensor) -> Tensor:
        expect(mlp, GptNeoxMLP, SwiGLU)
        kind = KINDS.index(mlp.activation.name)
        if isinstance(mlp, GptNeoxMLP):
            h = self.linear(mlp.fc, x, "inner")
            self.add("activate", h, len(h), kind)
        else:
            gate_up = self.linear(mlp.gate_up, x, "gate_up")
            h = self.buffer("inner", len(gate_up) // 2)
            self.add("gate", h, gate_up, len(h), kind)
        return self.linear(mlp.proj, h, "y")

    def norm(self, norm: nn.Module, x: Tensor, name: str | None, rows: int = 1) -> Tensor:
        """The norm of x, of so many rows of it; in a buffer, or without a name in place."""
        if type(norm) is nn.Identity:
            return x
        norm = norm.norm if type(norm) is TrainedNorm else norm
        expect(norm, nn.LayerNorm, LayerNorms, RMSNorm, UnitOffsetRMSNorm)
        y, size = x if name is None else self.buffer(name, len(x)), len(x) // rows
        weight, bias = (None if w is None else w.float() for w in (norm.weight, getattr(norm, "bias", None)))
        stride = size if type(norm) is LayerNorms else 0
        offset, centered = getattr(norm, "offset", 0.0), isinstance(norm, nn.LayerNorm)
        self.add("norm", y, x, rows, size, weight, bias, stride, norm.eps, offset, centered)
        return y

    def linear(self, layer: nn.Module, x: Tensor, name: str) -> Tensor:
        """W x + bias, and what wraps the layer does to it, in a buffer."""
        expect(layer, nn.Linear, QuantizedLinear, LoRALinear, ManyLoRAs, ScaledLinear)
        y, n = self.buffer(name, layer.out_features), layer.out_features
        if isinstance(layer, ScaledLinear):
            self.linear(layer.linear, x, name)
            self.add("scale", y, n, layer.scale, layer.shift)
        elif isinstance(layer, LoRALinear):
            A = layer.lora_A.to(self.dtype)
            low = torch.zeros(len(A))
            self.add("linear", low, x, *A.shape, TYPES[self.dtype], A, None, None, None, None)
            self.linear(layer.linear, x, name)
            for (start, stop), B, part in zip(layer.parts, layer.split_B(), low.split(layer.r), strict=True):
                B = (B * layer.scale).to(self.dtype).t().contiguous()
                self.add("update", y, n, part, B, TYPES[self.dtype], layer.r, start, stop)
        elif isinstance(layer, ManyLoRAs):
            self.linear(layer.linear, x, name)
            if number := layer.choice.same:
                A, B = layer.A[number], layer.B[number].t().contiguous()
                low = torch.zeros(len(A))
                self.add("linear", low, x, *A.shape, TYPES[self.dtype], A, None, None, None, None)
                self.add("update", y, n, low, B, TYPES[self.dtype], len(A), 0, n)
        else:
            bias = None if layer.bias is None else layer.bias.float()
            self.add("linear", y, x, n, layer.in_features, *self.weight(layer), bias)
        return y

    def weight(self, layer: nn.Linear | QuantizedLinear) -> tuple[int | Tensor | None, ...]:
        """Format, weight, and scale, zero and values of a quantized one."""
        if isinstance(layer, nn.Linear):
            return self.type(layer.weight), layer.weight, None, None, None
        tensors = unpacked(layer)
        if layer.format == "int8":
            return INT8, layer.weight, tensors["scale"].float(), None, None
        if layer.format == "int4":
            scale, zero, values = tensors["scale"], tensors["zero"], torch.arange(16.0)
        else:
            scale, zero, values = tensors["absmax"], None, torch.tensor(NF4.VALUES)
        return NIBBLES + self.type(scale), layer.weight, scale, zero, values

    def type(self, tensor: Tensor) -> int:
        if tensor.dtype not in TYPES:
            raise Unsupported(f"weights of {tensor.dtype}")
        return TYPES[tensor.dtype]


def expect(module: nn.Module, *kinds: type) -> None:
    """A class derived from one of these may do more than it."""
    if type(module) not in kinds:
        raise Unsupported(type(module).__name__)
