"""Records the operations of a decoding step as a list, the tape, by walking the modules of a model as it stands.

lit_gpt.generation.steps.native has it replayed by kernels/cpp/decode.cpp, steps.cuda by kernels in Triton.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lit_gpt.distributed.placement import PlacedExecution
from lit_gpt.kernels.declarations import ACTIVATION_NUMBERS, FORMAT_NUMBERS, GATE_NUMBERS
from lit_gpt.kernels.ops import quantized_format
from lit_gpt.methods.decoding_tape import RowChoice
from lit_gpt.model.alibi import alibi_slopes
from lit_gpt.model.attention import CausalSelfAttention
from lit_gpt.model.gpt import GPT, Block
from lit_gpt.model.linear import Linear
from lit_gpt.model.mixers.convolution import CausalConvolution
from lit_gpt.model.mlp import GptNeoxMLP, SwiGLU
from lit_gpt.model.norms import GroupedRMSNorm, LayerNorm, LayerNorms, PlainRMSNorm, QKNorm, RMSNorm, UnitOffsetRMSNorm
from lit_gpt.quantization.modules import QuantizedEmbedding, QuantizedLinear

TYPES = {torch.float32: FORMAT_NUMBERS["float32"], torch.bfloat16: FORMAT_NUMBERS["bfloat16"]}


class Unsupported(Exception):
    """The model has a part for which there is no operation."""


class Tape(ABC):
    """Records the operations of a model's step, for up to n rows; what records and runs them derives from it.

    What lies between the operations are float32 buffers (n, size) on the model's device.

    Attributes:
        types: the numbers of the dtypes that a model may have.
        gates_and_states: whether there are operations for gated attention, and for token mixers that carry a state.
    """

    types = TYPES
    gates_and_states = False

    def __init__(self, model: GPT, n: int) -> None:
        self.model, self.n = model, n
        self.dtype, self.device = model.dtype, model.wte.weight.device
        self.buffers: dict[tuple[str, int], Tensor] = {}
        self.choice: RowChoice | None = None
        with torch.no_grad():
            self.logits = self.record_model()

    # what operations are made with

    @abstractmethod
    def add(self, operation: str, *arguments: Tensor | float | None) -> None:
        """Record an operation of kernels/cpp/decode.cpp by its name, with the arguments that it has there."""

    @abstractmethod
    def add_product(self, y: Tensor, x: Tensor, layer: nn.Linear | QuantizedLinear) -> None:
        """Record the product of x with a layer's weight, and its bias, into y."""

    def buffer(self, name: str, size: int) -> Tensor:
        """Return a float32 (n, size) buffer, one for all layers."""
        if (name, size) not in self.buffers:
            self.buffers[name, size] = self.zeros(size)
        return self.buffers[name, size]

    def zeros(self, size: int) -> Tensor:
        return torch.zeros(self.n, size, dtype=torch.float32, device=self.device)

    # the parts of a model

    def record_model(self) -> Tensor:
        model, config = self.model, self.model.config
        expect(model, GPT)
        x = self.buffer("x", config.n_embd)
        self.embed(x, model.wte, float(torch.tensor(config.embedding_scale, dtype=self.dtype)), by_position=False)
        if model.wpe is not None:
            self.embed(x, model.wpe, 1.0, by_position=True, skipped=config.position_offset)
        self.norm(model.ln_e, x, None)
        rotations = self.rotations()
        for layer, (block, rotation) in enumerate(zip(model.h, rotations, strict=True)):
            self.block(block, x, layer, rotation)
        logits = self.linear(model.lm_head, self.norm(model.ln_f, x, "n"), "logits")
        if config.logit_divisor != 1.0 or config.logit_softcap:
            self.add("finish", logits, logits.size(1), float(config.logit_divisor), float(config.logit_softcap or 0))
        return logits

    def embed(
        self, x: Tensor, table: nn.Embedding | QuantizedEmbedding, factor: float, by_position: bool, skipped: int = 0
    ) -> None:
        """Set x to a row of the table, or with `by_position` add the position's row, which lies behind `skipped`."""
        if record := recorder(table):
            return record(self, x, factor, by_position, skipped)
        expect(table, nn.Embedding, QuantizedEmbedding)
        if isinstance(table, QuantizedEmbedding):
            kind, scale = quantized_format(table.weight, table.scale), table.scale.float()
        else:
            kind, scale = self.type(table.weight), None
        self.add("embed", x, table.weight[skipped:], kind, scale, x.size(1), factor, by_position)

    def rotations(self) -> list[tuple[Tensor, Tensor] | None]:
        """Return the cosine and sine of each layer, float32 (n, rope_n_elem / 2), if it is rotated."""
        model, config = self.model, self.model.config
        by_rope = {}
        for rope in dict.fromkeys((model.rope, model.local_rope)):  # which may be one
            frequencies = rope.frequencies.float().view(1 if rope.original is None else 2, -1)
            ropes, n = frequencies.shape
            by_rope[rope] = self.zeros(n), self.zeros(n)
            if n:
                factor = float(rope.attention_factor)
                self.add("angles", *by_rope[rope], frequencies, n, ropes, factor, self.types[self.dtype])
        kinds = [by_rope[model.rope if config.window(i) is None else model.local_rope] for i in range(config.n_layer)]
        return [None if i in config.unrotated_layers else kind for i, kind in enumerate(kinds)]

    def block(self, block: nn.Module, x: Tensor, layer: int, rotation: tuple[Tensor, Tensor] | None) -> None:
        expect(block, Block)
        assert isinstance(block, Block)
        if isinstance(block.execution, PlacedExecution):
            raise Unsupported("blocks on several devices")
        if block.layer_input is not None or block.layer_scale is not None:
            raise Unsupported("an input of a layer's own, or a factor of what it gives")
        n_1 = self.norm(block.norm_1, x, "n_1")
        h = self.norm(block.post_norm_1, self.mixer(block, n_1, layer, rotation), "h")
        if not block.parallel:
            self.add("add", x, x.size(1), h, float(block.scale))
        if block.mlp is None:
            return
        n_2 = n_1 if block.norm_2 is None else self.norm(block.norm_2, x, "n_2")
        y = self.norm(block.post_norm_2, self.mlp(block.mlp, n_2), "y")
        if block.parallel:
            self.add("add", x, x.size(1), h, 1.0)
        self.add("add", x, x.size(1), y, 1.0 if block.parallel else float(block.scale))

    def mixer(self, block: Block, x: Tensor, layer: int, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """Compute what mixes a block's tokens, in a buffer."""
        (mixer, *others) = block.token_mixers.values()
        gated = isinstance(mixer, CausalSelfAttention) and mixer.gated
        if others or (block.mixer is not None or gated or block.mlp is None) and not self.gates_and_states:
            raise Unsupported("a token mixer")
        if isinstance(mixer, CausalSelfAttention):
            return self.attention(mixer, x, layer, rotation)
        if record := recorder(mixer):
            return record(self, x, layer)
        raise Unsupported(type(mixer).__name__)

    def attention(
        self, attn: CausalSelfAttention, x: Tensor, layer: int, rotation: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        expect(attn, CausalSelfAttention)
        heads, groups, size, scores = attn.n_head, attn.n_query_groups, attn.head_size, attn.scores
        gated = self.linear(attn.qkv, x, "qkv")
        qkv = self.part(gated, sum(attn.sizes)) if attn.gated else gated
        growth = self.model.config.query_growth
        if attn.clip is not None or growth is not None or attn.alibi_rounded or attn.sinks is not None or scores.chunk:
            raise Unsupported("clamped or scaled queries, rounded slopes, sinks, or chunks")
        if attn.v_norm is not None or 0 in attn.sizes:
            raise Unsupported("normed values, or keys and values that are another layer's")
        if attn.qk_norm is not None and not attn.norms_rotated:
            self.qk_norm(attn.qk_norm, qkv, attn.sizes)
        if rotation is not None and rotation[0].numel():
            self.add("rotate", qkv, qkv.size(1), heads + groups, size, *rotation, rotation[0].size(1))
        if attn.qk_norm is not None and attn.norms_rotated:
            self.qk_norm(attn.qk_norm, qkv, attn.sizes)
        sizes, kind = (heads, groups, size), self.types[self.dtype]
        self.add("append", qkv, *sizes, layer, kind)
        slopes = None
        if attn.alibi:  # as the model rounds them
            slopes = (alibi_slopes(heads) / scores.scale).to(self.dtype).float() * scores.scale
        y, how = self.buffer("heads", heads * size), (float(scores.scale), float(scores.softcap or 0))
        self.add("attend", y, qkv, *sizes, layer, kind, *how, slopes, scores.window or 0)
        if attn.prefix is not None:
            record = recorder(attn.prefix)
            if record is None:
                raise Unsupported(type(attn.prefix).__name__)
            k, v, gate = record(attn, self.dtype)
            self.add("attend_prefix", y, qkv, *sizes, k, v, k.size(2), *how, gate)
        if attn.gated:
            self.multiply(y, y, gated[:, qkv.size(1) :], "sigmoid")
        return self.linear(attn.proj, y, "h")

    def part(self, x: Tensor, size: int) -> Tensor:
        """Copy the first columns of x, so many, into a buffer."""
        y = self.buffer("part", size)
        self.add("part", y, size, x, x.size(1))
        return y

    def qk_norm(self, norms: QKNorm, qkv: Tensor, sizes: tuple[int, ...]) -> None:
        expect(norms, QKNorm)
        for norm, part, width in zip((norms.q, norms.k), qkv.split(sizes, 1), norms.widths, strict=False):
            if norm is not None:
                self.norm(norm, part, None, part.size(1) // width)

    def mlp(self, mlp: nn.Module, x: Tensor) -> Tensor:
        """Compute an MLP, or what wraps one, in a buffer."""
        if record := recorder(mlp):
            return record(self, x)
        expect(mlp, GptNeoxMLP, SwiGLU)
        assert isinstance(mlp, GptNeoxMLP | SwiGLU)
        if isinstance(mlp, GptNeoxMLP):
            h = self.linear(mlp.fc, x, "inner")
            self.activate(h, mlp.activation.name)
        else:
            gate_up = self.linear(mlp.gate_up, x, "gate_up")
            h = self.buffer("inner", gate_up.size(1) // 2)
            self.add("gate", h, gate_up, h.size(1), ACTIVATION_NUMBERS[mlp.activation.name])
        return self.linear(mlp.proj, h, "y")

    def norm(self, norm: nn.Module, x: Tensor, name: str | None, parts: int = 1) -> Tensor:
        """Normalize x in so many parts, into a buffer, or without a name in place."""
        if type(norm) is nn.Identity:
            return x
        if record := recorder(norm):
            return record(self, x, name, parts)
        expect(norm, LayerNorm, nn.LayerNorm, LayerNorms, RMSNorm, UnitOffsetRMSNorm, GroupedRMSNorm, PlainRMSNorm)
        assert isinstance(norm, nn.LayerNorm | RMSNorm | PlainRMSNorm)
        y, size = x if name is None else self.buffer(name, x.size(1)), x.size(1) // parts
        weight, bias = (
            w.float() if isinstance(w, Tensor) else None for w in (norm.weight, getattr(norm, "bias", None))
        )
        stride = size if type(norm) in (LayerNorms, GroupedRMSNorm) else 0
        offset, centered = getattr(norm, "offset", 0.0), isinstance(norm, nn.LayerNorm)
        rows = y[0], y.stride(0), x[0], x.stride(0)  # of a view only a row is contiguous
        self.add("norm", *rows, parts, size, weight, bias, stride, float(norm.eps), offset, centered)
        return y

    def linear(self, layer: nn.Module, x: Tensor, name: str) -> Tensor:
        """Compute W x + bias, and what wraps the layer does to it, in a buffer."""
        if record := recorder(layer):
            return record(self, x, name)
        expect(layer, Linear, QuantizedLinear)
        assert isinstance(layer, nn.Linear | QuantizedLinear)
        y = self.buffer(name, layer.out_features)
        self.add_product(y, x, layer)
        return y

    # what token mixers record: see lit_gpt.model.mixers.decoding

    def multiply(self, y: Tensor, x: Tensor, by: Tensor, gate: str = "identity") -> None:
        """Set y to x times a function of `by`; x is all of y, or another buffer."""
        self.add("multiply", y, y.size(1), x[0], x.stride(0), by[0], by.stride(0), GATE_NUMBERS[gate])

    def convolve(self, convolution: CausalConvolution, x: Tensor, layer: int) -> Tensor:
        """Convolve x with the tail in a layer's cache, which takes it in, in a buffer."""
        expect(convolution, CausalConvolution)
        y, weight = self.buffer("convolved", x.size(1)), convolution.weight.float().squeeze(1).t().contiguous()
        bias = None if convolution.bias is None else convolution.bias.float()
        how = convolution.size, weight, bias, layer, self.types[self.dtype]
        self.add("convolve", y, x[0], x.stride(0), x.size(1), *how)
        return y

    # what methods record: low-rank updates, scales, activations

    def lora_down(self, A: Tensor, x: Tensor) -> Tensor:
        """Multiply x by A (ranks, in_features)."""
        low = self.zeros(len(A))
        self.add("lora_down", low, x, *A.shape, A, self.types[self.dtype])
        return low

    def lora_up(self, y: Tensor, low: Tensor, first: int, B: Tensor, rows: tuple[int, int]) -> None:
        """Add to the rows (start, stop) of y what B makes of the ranks of `low` from `first` on.

        Args:
            B: (ranks, stop - start), transposed, in the model's dtype.
        """
        self.add("lora_up", y, y.size(1), low, low.size(1), first, B, self.types[self.dtype], len(B), *rows)

    def row_lora_down(self, layer: int, x: Tensor, ranks: int) -> Tensor:
        """Multiply each row of x by the A of its own update of a layer, of so many ranks at most."""
        low = self.zeros(ranks)
        self.add("row_lora_down", low, x, ranks, x.size(1), layer, self.types[self.dtype])
        return low

    def row_lora_up(self, y: Tensor, low: Tensor, layer: int) -> None:
        """Add to each row of y what the B of its own update makes of `low`."""
        self.add("row_lora_up", y, y.size(1), low, low.size(1), layer, self.types[self.dtype])

    def scale(self, y: Tensor, scale: Tensor, shift: Tensor) -> None:
        """Replace y by scale * (y + shift)."""
        self.add("scale", y, y.size(1), scale, shift)

    def activate(self, y: Tensor, activation: str) -> None:
        """Apply an activation by its name to y, in place."""
        self.add("activate", y, y.size(1), ACTIVATION_NUMBERS[activation])

    def type(self, tensor: Tensor) -> int:
        if tensor.dtype not in self.types:
            raise Unsupported(f"weights of {tensor.dtype}")
        return self.types[tensor.dtype]


def check_places(model: GPT, places: int, tokens: list[int], positions: list[int]) -> None:
    """Raise IndexError unless the model has all tokens, and model and cache have room for the positions."""
    limit = min(places, model.config.block_size if model.wpe else places)
    for token, position in zip(tokens, positions, strict=True):
        if not (0 <= token < model.config.padded_vocab_size and position < limit):
            raise IndexError(f"token {token} or position {position} is beyond what model and cache have room for")


def expect(module: nn.Module, *kinds: type) -> None:
    """Refuse a module that is not exactly of one of these kinds: a derived class may do more, and so may a hook."""
    if type(module) not in kinds or module._forward_hooks or module._forward_pre_hooks:
        raise Unsupported(type(module).__name__)


def recorder(module: nn.Module) -> Callable[..., Any] | None:
    """Return the `record` method by which a module that a method has attached adds its operations to a tape, if any.

    Only a method of the class itself counts: a derived class may do more.

    Raises:
        Unsupported: it has one, and a hook.
    """
    if "record" not in vars(type(module)):
        return None
    expect(module, type(module))
    return module.record  # type: ignore[return-value]  # torch: attributes are tensors or modules


Versions = list[tuple[Tensor, tuple[int, ...]]]


def versions(model: GPT) -> Versions:
    """Return all that a model computes with, where each tensor lies and how often it was written to."""
    tensors = chain(model.parameters(), model.buffers())
    return [(x, (x.data_ptr(), 0 if x.is_inference() else x._version)) for x in tensors]


def changed(before: Versions, now: Versions) -> bool:
    pairs = zip(before, now, strict=False)
    return len(before) != len(now) or any(old is not new or m != n for (old, m), (new, n) in pairs)
