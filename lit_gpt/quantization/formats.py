"""Formats of weight-only quantization: weights kept in 8 or 4 bits and dequantized when they are used.

Linear layers of the blocks become QuantizedLinear in the chosen format (lit_gpt/quantization/modules.py). Embedding and
head are kept in int8 whatever the format, for few bits hurt them most; tied ones share their codes. Norms and biases
stay as they are. A quantized layer is frozen, and methods wrap it as they wrap any other.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cache
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.kernels import ops
from lit_gpt.kernels.cuda.dequantize import QuantizedWeight, dequantize
from lit_gpt.kernels.cuda.launch import serves_on
from lit_gpt.kernels.policy import policy
from lit_gpt.quantization.packing import (
    GROUP,
    nibble_table,
    nonzero,
    pack_nibbles,
    round_up_to_bf16,
    split_groups,
    unpack_nibbles,
)

ABSMAX_BLOCK = 256  # absmax that share a scale of their own, in double quantization
CHUNK, CPU_CHUNK = 2**26, 2**22  # weights that are dequantized to float32 at a time
Tensors = dict[str, Tensor]
Layout = dict[str, tuple[tuple[int, ...], torch.dtype | None]]
KernelArguments = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # codes, scale, zero, values of a byte's codes


class Format(ABC):
    """Keeps the rows of a weight as a few named tensors, and computes them again from these."""

    @abstractmethod
    def layout(self, rows: int, columns: int) -> Layout:
        """Return shape and dtype of each tensor of a weight; None stands for the dtype of the model's other weights."""

    @abstractmethod
    def encode(self, w: Tensor) -> Tensors:
        """Return the tensors for some rows of a weight, float32 (rows, columns)."""

    @abstractmethod
    def decode(self, tensors: Tensors) -> Tensor:
        """Return the rows again, float32, with the columns that were added to fill the last group."""

    @abstractmethod
    def for_kernels(self, tensors: Tensors) -> KernelArguments:
        """Return unpacked tensors as `ops.dequantize` takes them."""

    @abstractmethod
    def for_cuda(self, tensors: Tensors, columns: int) -> QuantizedWeight:
        """Return tensors as they are stored as the kernels of lit_gpt.kernels.cuda read them."""

    def pack(self, tensors: Tensors) -> Tensors:
        """Finish what can be done only when all rows are encoded."""
        return tensors

    def stored(self, tensors: Tensors, rows: int, columns: int, dtype: torch.dtype) -> Tensors:
        """Return the tensors of all rows as they are kept, with `dtype` where the layout leaves it open."""
        layout = self.layout(rows, columns)
        return {key: tensor.to(layout[key][1] or dtype) for key, tensor in self.pack(tensors).items()}

    def unpack(self, tensors: Tensors) -> Tensors:
        """Undo `pack`: return tensors whose first dimension is the rows."""
        return tensors

    def decode_by_kernel(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> Tensor | None:
        """Return the rows (rows, columns) rounded to `dtype`, or None where no kernel can compute them."""
        if not ops.supports_on(tensors["weight"].device, dtype):
            return None
        arguments = self.for_kernels(tensors)
        return ops.dequantize(*arguments, columns, dtype) if ops.supports_dequantize(*arguments[:2]) else None


class Int8(Format):
    """Symmetric int8 with a scale for each output channel: w = scale * code, code from -127 to 127.

    The scale is a bfloat16 number, so that a model computes the same weights in whatever precision it is loaded.
    """

    def layout(self, rows: int, columns: int) -> Layout:
        return {"weight": ((rows, columns), torch.int8), "scale": ((rows,), None)}

    def encode(self, w: Tensor) -> Tensors:
        scale = round_up_to_bf16(w.abs().amax(1) / 127)  # not down, or the largest weight would be cut
        return {"weight": (w / nonzero(scale).unsqueeze(1)).round_().to(torch.int8), "scale": scale}

    def decode(self, tensors: Tensors) -> Tensor:
        return tensors["weight"].float().mul_(tensors["scale"].float().unsqueeze(1))

    def for_kernels(self, tensors: Tensors) -> KernelArguments:
        return tensors["weight"], tensors["scale"].float(), None, None

    def for_cuda(self, tensors: Tensors, columns: int) -> QuantizedWeight:
        return QuantizedWeight(tensors["weight"], tensors["scale"], None, None, None, None, columns)


class FourBit(Format):
    """Groups of 64 weights along the input, each with parameters that say what the 16 codes stand for.

    Two codes share a byte, the first in its upper half. Methods take and return a group's parameters in the order of
    PARAMS, each broadcastable to the group's weights.
    """

    PARAMS: tuple[str, ...]  # names of a group's parameters
    PARAMS_DTYPE: torch.dtype | None = None  # None: that of the model's other weights
    CLIPS = (1.0, 0.9, 0.8)
    ROUNDS = 4

    def layout(self, rows: int, columns: int) -> Layout:
        groups = -(-columns // GROUP)
        codes = (rows, groups * GROUP // 2), torch.uint8
        return {"weight": codes} | {name: ((rows, groups), self.PARAMS_DTYPE) for name in self.PARAMS}

    @abstractmethod
    def init_params(self, groups: Tensor, clip: float) -> tuple[Tensor, ...]:
        """Return parameters that cover the share `clip` of each group's range."""

    @abstractmethod
    def refine(self, groups: Tensor, importance: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        """Return parameters of less error than the given ones, by least squares with their codes held fixed."""

    @abstractmethod
    def codes(self, w: Tensor, *params: Tensor) -> Tensor:
        """Return the codes of the values nearest to some weights, as whole numbers of any dtype."""

    @abstractmethod
    def values(self, codes: Tensor, *params: Tensor) -> Tensor:
        """Return what codes stand for, float32."""

    def round_params(self, *params: Tensor) -> tuple[Tensor, ...]:
        """Round a group's parameters to what will be stored."""
        return params

    def fit_params(self, groups: Tensor, importance: Tensor) -> tuple[Tensor, ...]:
        """Return parameters (..., 1) that give groups (..., n) a small squared error, weighted by `importance` (n,).

        Rounding and a least-squares fit take turns, from several clipped ranges; the best result of each group is
        taken. The plain range would do worse.
        """
        best: tuple[Tensor, ...] = ()
        least: Tensor | float = torch.inf
        for clip in self.CLIPS:
            params = self.init_params(groups, clip)
            for _ in range(self.ROUNDS):
                params = self.refine(groups, importance, *params)
            params = self.round_params(*params)
            error = self.values(self.codes(groups, *params), *params).sub_(groups).square_().mul_(importance)
            error = error.sum(-1, keepdim=True)
            better = error < least
            best = tuple(torch.where(better, *pair) for pair in zip(params, best or params, strict=True))
            least = torch.where(better, error, least)
        return best

    def tensors(self, codes: Tensor, *params: Tensor) -> Tensors:
        """Return the tensors of codes (rows, columns), all groups full, and of parameters (rows, groups)."""
        return {"weight": pack_nibbles(codes.to(torch.uint8))} | dict(zip(self.PARAMS, params, strict=True))


class Int4(FourBit):
    """Asymmetric 4 bits: w = scale * code + zero in each group, code from 0 to 15; bfloat16 parameters as in Int8."""

    PARAMS = ("scale", "zero")

    def encode(self, w: Tensor) -> Tensors:
        groups = split_groups(w)
        params = self.fit_params(groups, torch.ones(GROUP, device=w.device))
        return self.tensors(self.codes(groups, *params).flatten(1), *(x.squeeze(-1) for x in params))

    def decode(self, tensors: Tensors) -> Tensor:
        codes = unpack_nibbles(tensors["weight"]).float().unflatten(-1, (-1, GROUP))
        return self.values(codes, *(tensors[name].float().unsqueeze(-1) for name in self.PARAMS)).flatten(1)

    def for_kernels(self, tensors: Tensors) -> KernelArguments:
        return tensors["weight"], tensors["scale"], tensors["zero"], nibble_table(torch.arange(16, dtype=torch.float32))

    def for_cuda(self, tensors: Tensors, columns: int) -> QuantizedWeight:
        return QuantizedWeight(tensors["weight"], tensors["scale"], tensors["zero"], None, None, None, columns)

    def init_params(self, groups: Tensor, clip: float) -> tuple[Tensor, ...]:
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        span = (high - low) * clip
        return span / 15, (low + high - span) / 2

    def refine(self, groups: Tensor, importance: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        share = importance / importance.sum()
        codes = self.codes(groups, *params)
        center = (codes * share).sum(-1, keepdim=True)
        codes -= center
        variance = (codes.square() * share).sum(-1, keepdim=True)
        scale = torch.where(variance > 0, (codes * groups * share).sum(-1, keepdim=True) / variance, params[0])
        return scale, (groups * share).sum(-1, keepdim=True) - scale * center

    def round_params(self, *params: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.bfloat16().float() for x in params)

    def codes(self, w: Tensor, *params: Tensor) -> Tensor:
        scale, zero = params
        return (w - zero).div_(nonzero(scale)).round_().clamp_(0, 15)

    def values(self, codes: Tensor, *params: Tensor) -> Tensor:
        scale, zero = params
        return torch.addcmul(zero, codes, scale)


def normal_float() -> list[float]:
    """Return the 16 values of NF4 (Dettmers et al. 2023, QLoRA, appendix E).

    They are quantiles of a normal distribution, 8 on its positive side, 7 on its negative one and zero, divided by the
    largest.
    """
    edge = 1 - (1 / 30 + 1 / 32) / 2  # the outermost quantile: between that of 15 and that of 16 values
    quantile = NormalDist().inv_cdf
    positive = [quantile(0.5 + (edge - 0.5) * i / 8) for i in range(1, 9)]
    negative = [-quantile(0.5 + (edge - 0.5) * i / 7) for i in range(7, 0, -1)]
    return [value / positive[-1] for value in (*negative, 0.0, *positive)]


class NF4(FourBit):
    """4-bit NormalFloat (Dettmers et al. 2023): w = absmax * value[code], absmax of groups of 64 along the input.

    absmax is float32, and by rounding to the nearest what its name says. So does bitsandbytes keep it.
    """

    VALUES = normal_float()
    PARAMS = ("absmax",)
    PARAMS_DTYPE = torch.float32

    def table(self, device: torch.device | None = None) -> Tensor:
        """Return the values of the 16 codes, float32 (16,)."""
        if device is not None and device.type == "cuda":  # where the copy would wait for all that is under way
            return _values_on(device)
        return torch.tensor(self.VALUES, dtype=torch.float32, device=device)

    def encode(self, w: Tensor) -> Tensors:
        groups = split_groups(w)
        (absmax,) = self.init_params(groups, 1.0)
        return self.tensors(self.codes(groups, absmax).flatten(1), absmax.squeeze(-1))

    def decode(self, tensors: Tensors) -> Tensor:
        codes, absmax = tensors["weight"], tensors["absmax"]
        pairs = nibble_table(self.table(codes.device)).view(torch.int64)  # two values as one number
        values = pairs.flatten().index_select(0, codes.flatten().long()).view(torch.float32)
        return values.view(*absmax.shape, GROUP).mul_(absmax.unsqueeze(-1)).flatten(1)

    def for_kernels(self, tensors: Tensors) -> KernelArguments:
        return tensors["weight"], tensors["absmax"], None, nibble_table(self.table())

    def for_cuda(self, tensors: Tensors, columns: int) -> QuantizedWeight:
        codes, absmax, values = tensors["weight"], tensors["absmax"], self.table(tensors["weight"].device)
        double = tensors.get("absmax_scale"), tensors.get("absmax_mean")
        return QuantizedWeight(codes, absmax, None, values, *double, columns)

    def init_params(self, groups: Tensor, clip: float) -> tuple[Tensor, ...]:
        return (groups.abs().amax(-1, keepdim=True) * clip,)

    def refine(self, groups: Tensor, importance: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        values = self.values(self.codes(groups, *params), torch.ones_like(params[0]))
        square = (values.square() * importance).sum(-1, keepdim=True)
        absmax = (values * groups * importance).sum(-1, keepdim=True) / nonzero(square)
        return (torch.where(absmax > 0, absmax, params[0]),)

    def codes(self, w: Tensor, *params: Tensor) -> Tensor:
        values = self.table(w.device)
        return torch.bucketize(w / nonzero(params[0]), (values[1:] + values[:-1]) / 2, out_int32=True)

    def values(self, codes: Tensor, *params: Tensor) -> Tensor:
        return self.table(codes.device)[codes.long()] * params[0]


class NF4Double(NF4):
    """NF4 with double quantization: the absmax, less their mean, in int8 with a float32 scale for each 256 of them."""

    def layout(self, rows: int, columns: int) -> Layout:
        layout = super().layout(rows, columns)
        shape, _ = layout["absmax"]
        scales = -(-shape[0] * shape[1] // ABSMAX_BLOCK)
        more = {"absmax_scale": ((scales,), torch.float32), "absmax_mean": ((1,), torch.float32)}
        return layout | {"absmax": (shape, torch.int8)} | more

    def pack(self, tensors: Tensors) -> Tensors:
        absmax = tensors["absmax"]
        mean = absmax.mean().view(1)
        blocks = F.pad((absmax - mean).flatten(), (0, -absmax.numel() % ABSMAX_BLOCK)).view(-1, ABSMAX_BLOCK)
        scale = blocks.abs().amax(1) / 127
        codes = (blocks / nonzero(scale).unsqueeze(1)).round_().to(torch.int8)
        codes = codes.flatten()[: absmax.numel()].view(absmax.shape)
        return tensors | {"absmax": codes, "absmax_scale": scale, "absmax_mean": mean}

    def unpack(self, tensors: Tensors) -> Tensors:
        codes, scale = tensors["absmax"], tensors["absmax_scale"]
        scale = scale.repeat_interleave(ABSMAX_BLOCK, output_size=len(scale) * ABSMAX_BLOCK)
        absmax = codes.float().mul_(scale[: codes.numel()].view(codes.shape)).add_(tensors["absmax_mean"])
        return {"weight": tensors["weight"], "absmax": absmax.clamp_(min=0)}


@cache
def _values_on(device: torch.device) -> Tensor:
    return torch.tensor(NF4.VALUES, dtype=torch.float32, device=device)


FORMATS: dict[str, Format] = {"int8": Int8(), "int4": Int4(), "nf4": NF4(), "nf4-dq": NF4Double()}


def row_chunks(rows: int, columns: int, device: torch.device, cut: int = 1) -> Iterator[slice]:
    """Return the rows of a weight in chunks of at most CHUNK / `cut` weights, or CPU_CHUNK / `cut` on a CPU."""
    on_cpu = device.type == "cpu" and (torch.compiler.is_compiling() or not policy().simulate_cuda)
    step = max(1, (CPU_CHUNK if on_cpu else CHUNK) // cut // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


@torch.no_grad()
def encode(
    weight: Tensor,
    name: str,
    dtype: torch.dtype,
    device: torch.device | None = None,
    done: Callable[[Tensor], None] = lambda rows: None,
) -> Tensors:
    """Quantize a weight (rows, columns) chunk by chunk; return the tensors of its format on `device`.

    Args:
        name: a key of FORMATS.
        dtype: what the tensors have whose dtype the format leaves open.
        done: called with each chunk of the weight when it is no longer needed.
    """
    quantizer, device = FORMATS[name], device or weight.device
    encoded: Tensors = {}
    rows, columns = weight.shape
    for span in row_chunks(rows, columns, device, cut=8):  # it takes several tensors of that size
        for key, part in quantizer.encode(weight[span].to(device, torch.float32)).items():
            if key not in encoded:
                encoded[key] = part.new_empty(rows, *part.shape[1:])
            encoded[key][span] = part
        done(weight[span])
    return quantizer.stored(encoded, rows, columns, dtype)


@torch.no_grad()
def decode(tensors: Tensors, name: str, columns: int, dtype: torch.dtype) -> Tensor:
    """Return the weight (rows, columns) of `encode`'s tensors, computed in float32 and rounded once to `dtype`."""
    quantizer = FORMATS[name]
    if serves_on(tensors["weight"]):
        return dequantize(quantizer.for_cuda(tensors, columns), dtype)
    tensors = quantizer.unpack(tensors)
    codes, weight = tensors["weight"], quantizer.decode_by_kernel(tensors, columns, dtype)
    if weight is None:
        weight = torch.empty(len(codes), columns, dtype=dtype, device=codes.device)
        for span, part in dequantized_chunks(tensors, quantizer, columns, dtype):
            weight[span] = part
    return weight


def dequantized_chunks(
    tensors: Tensors, quantizer: Format, columns: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Yield which rows a chunk holds, and the chunk of the weight, from unpacked tensors."""
    for span in row_chunks(len(tensors["weight"]), columns, tensors["weight"].device):
        rows = {key: tensor[span] for key, tensor in tensors.items()}
        weight = quantizer.decode_by_kernel(rows, columns, dtype)
        yield span, quantizer.decode(rows)[:, :columns].to(dtype) if weight is None else weight
