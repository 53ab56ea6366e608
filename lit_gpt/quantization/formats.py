"""Weight-only quantization: linear layers whose weights are kept in 8 or 4 bits and turned back when they are used.

Attaches to a GPT from outside: the blocks' linear layers become QuantizedLinear in the chosen format. Embedding and
head are kept in int8 whatever the format, for few bits hurt them most; tied ones share their codes. Norms and biases
stay as they are. A quantized layer is frozen, and methods wrap it as they wrap any other.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import cache
from statistics import NormalDist
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.kernels import ops
from lit_gpt.kernels.policy import policy

GROUP = 64  # weights of a row that share a scale, in the formats of 4 bits
SCALES = 256  # scales that share a scale of their own, in double quantization
PIECE, CPU_PIECE = 2**26, 2**22  # weights that are turned back at a time, in float32
Tensors = dict[str, Tensor]
Layout = dict[str, tuple[tuple[int, ...], torch.dtype | None]]


class Int8:
    """Symmetric, a scale for each output channel: w = scale * code, code from -127 to 127.

    The scale is a bfloat16 number, so that a model computes the same weights in whatever precision it is loaded.
    """

    def layout(self, rows: int, columns: int) -> Layout:
        """Shape and dtype of each tensor that stands for a weight; None: the dtype of the model's other weights."""
        return {"weight": ((rows, columns), torch.int8), "scale": ((rows,), None)}

    def encode(self, w: Tensor) -> Tensors:
        """The tensors for some rows of a weight, float32 (rows, columns)."""
        scale = up_to_bf16(w.abs().amax(1) / 127)  # not down, or the largest weight would be cut
        return {"weight": (w / divisor(scale).unsqueeze(1)).round_().to(torch.int8), "scale": scale}

    def decode(self, tensors: Tensors) -> Tensor:
        """The rows again, float32 (rows, columns), with what was added to fill the last group."""
        return tensors["weight"].float().mul_(tensors["scale"].float().unsqueeze(1))

    def pack(self, tensors: Tensors) -> Tensors:
        """What can be done only when all rows are encoded."""
        return tensors

    def unpack(self, tensors: Tensors) -> Tensors:
        """Undo `pack`: tensors whose first dimension is the rows."""
        return tensors

    def for_kernels(self, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Unpacked tensors as `kernels.dequantize` takes them."""
        return tensors["weight"], tensors["scale"].float(), None, None

    def decode_by_kernel(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> Tensor | None:
        """What `decode` gives without what was added, rounded to `dtype`; None where no kernel can do it."""
        if not ops.supports_on(tensors["weight"].device, dtype):
            return None
        given = self.for_kernels(tensors)
        return ops.dequantize(*given, columns, dtype) if ops.supports_dequantize(*given[:2]) else None


class FourBit(Int8):
    """Groups of 64 along the input, each with numbers of its own that say what the 16 codes stand for.

    Two codes a byte, the first in the upper half.
    """

    FITTED: tuple[str, ...]  # names of a group's numbers
    CLIPS = (1.0, 0.9, 0.8)
    ROUNDS = 4

    def fit(self, groups: Tensor, importance: Tensor) -> tuple[Tensor, ...]:
        """Numbers (..., 1) each that give groups (..., n) a small squared error, in which each of n has its weight.

        They are not the groups' range: rounding and a least-squares fit take turns, from several clipped ranges.
        """
        best, least = (), None
        for clip in self.CLIPS:
            found = self.start(groups, clip)
            for _ in range(self.ROUNDS):
                found = self.refit(groups, importance, *found)
            found = self.kept(*found)
            error = self.values(self.codes(groups, *found), *found).sub_(groups).square_().mul_(importance)
            error = error.sum(-1, keepdim=True)
            better = error < (torch.inf if least is None else least)
            best = tuple(torch.where(better, *pair) for pair in zip(found, best or found, strict=True))
            least = error if least is None else torch.minimum(error, least)
        return best

    def tensors(self, codes: Tensor, *fitted: Tensor) -> Tensors:
        """Those of codes (rows, columns), all groups full, and each group's numbers (rows, groups)."""
        return {"weight": pack_nibbles(codes.to(torch.uint8))} | dict(zip(self.FITTED, fitted, strict=True))

    def kept(self, *fitted: Tensor) -> tuple[Tensor, ...]:
        """A group's numbers as they will be stored."""
        return fitted

    def start(self, groups: Tensor, clip: float) -> tuple[Tensor, ...]:
        """A group's numbers by its range, `clip` of which is covered."""
        raise NotImplementedError

    def refit(self, groups: Tensor, importance: Tensor, *fitted: Tensor) -> tuple[Tensor, ...]:
        """Numbers of less error than the given ones."""
        raise NotImplementedError

    def codes(self, w: Tensor, *fitted: Tensor) -> Tensor:
        """Of the values that are nearest to some weights, as whole numbers of any dtype."""
        raise NotImplementedError

    def values(self, codes: Tensor, *fitted: Tensor) -> Tensor:
        """What codes stand for, float32."""
        raise NotImplementedError


class Int4(FourBit):
    """Each group with a scale and a zero: w = scale * code + zero, code from 0 to 15; bfloat16 numbers as in Int8."""

    FITTED = ("scale", "zero")

    def layout(self, rows: int, columns: int) -> Layout:
        groups = -(-columns // GROUP)
        scales = ((rows, groups), None)
        return {"weight": ((rows, groups * GROUP // 2), torch.uint8), "scale": scales, "zero": scales}

    def encode(self, w: Tensor) -> Tensors:
        groups = grouped(w)
        fitted = self.fit(groups, torch.ones(GROUP, device=w.device))
        return self.tensors(self.codes(groups, *fitted).flatten(1), *(x.squeeze(-1) for x in fitted))

    def start(self, groups: Tensor, clip: float) -> tuple[Tensor, ...]:
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        span = (high - low) * clip
        return span / 15, (low + high - span) / 2

    def refit(self, groups: Tensor, importance: Tensor, *fitted: Tensor) -> tuple[Tensor, ...]:
        share = importance / importance.sum()
        codes = self.codes(groups, *fitted)
        center = (codes * share).sum(-1, keepdim=True)
        codes -= center
        variance = (codes.square() * share).sum(-1, keepdim=True)
        scale = torch.where(variance > 0, (codes * groups * share).sum(-1, keepdim=True) / variance, fitted[0])
        return scale, (groups * share).sum(-1, keepdim=True) - scale * center

    def kept(self, *fitted: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.bfloat16().float() for x in fitted)

    def codes(self, w: Tensor, *fitted: Tensor) -> Tensor:
        scale, zero = fitted
        return (w - zero).div_(divisor(scale)).round_().clamp_(0, 15)

    def values(self, codes: Tensor, *fitted: Tensor) -> Tensor:
        scale, zero = fitted
        return torch.addcmul(zero, codes, scale)

    def for_kernels(self, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return tensors["weight"], tensors["scale"], tensors["zero"], nibble_table(torch.arange(16, dtype=torch.float32))

    def decode(self, tensors: Tensors) -> Tensor:
        codes = unpack_nibbles(tensors["weight"]).float().unflatten(-1, (-1, GROUP))
        return self.values(codes, *(tensors[name].float().unsqueeze(-1) for name in self.FITTED)).flatten(1)


def normal_float() -> list[float]:
    """The 16 values of NF4 (Dettmers et al. 2023, QLoRA, appendix E): quantiles of a normal distribution, 8 on its
    positive side, 7 on its negative one and zero, divided by the largest."""
    edge = 1 - (1 / 30 + 1 / 32) / 2  # the outermost quantile: between that of 15 and that of 16 values
    quantile = NormalDist().inv_cdf
    positive = [quantile(0.5 + (edge - 0.5) * i / 8) for i in range(1, 9)]
    negative = [-quantile(0.5 + (edge - 0.5) * i / 7) for i in range(7, 0, -1)]
    return [value / positive[-1] for value in (*negative, 0.0, *positive)]


class NF4(FourBit):
    """4-bit NormalFloat (Dettmers et al. 2023): w = absmax * value[code], absmax of blocks of 64 along the input.

    absmax is float32, and by rounding to the nearest what its name says. So does bitsandbytes keep it.
    """

    VALUES = normal_float()
    FITTED = ("absmax",)

    def table(self, device: torch.device | None = None) -> Tensor:
        return torch.tensor(self.VALUES, dtype=torch.float32, device=device)

    def layout(self, rows: int, columns: int) -> Layout:
        blocks = -(-columns // GROUP)
        return {"weight": ((rows, blocks * GROUP // 2), torch.uint8), "absmax": ((rows, blocks), torch.float32)}

    def encode(self, w: Tensor) -> Tensors:
        blocks = grouped(w)
        (absmax,) = self.start(blocks, 1.0)
        return self.tensors(self.codes(blocks, absmax).flatten(1), absmax.squeeze(-1))

    def start(self, groups: Tensor, clip: float) -> tuple[Tensor, ...]:
        return (groups.abs().amax(-1, keepdim=True) * clip,)

    def refit(self, groups: Tensor, importance: Tensor, *fitted: Tensor) -> tuple[Tensor, ...]:
        values = self.values(self.codes(groups, *fitted), torch.ones_like(fitted[0]))
        square = (values.square() * importance).sum(-1, keepdim=True)
        found = (values * groups * importance).sum(-1, keepdim=True) / divisor(square)
        return (torch.where(found > 0, found, fitted[0]),)

    def codes(self, w: Tensor, *fitted: Tensor) -> Tensor:
        values = self.table(w.device)
        return torch.bucketize(w / divisor(fitted[0]), (values[1:] + values[:-1]) / 2, out_int32=True)

    def values(self, codes: Tensor, *fitted: Tensor) -> Tensor:
        return self.table(codes.device)[codes.long()] * fitted[0]

    def decode(self, tensors: Tensors) -> Tensor:
        codes, absmax = tensors["weight"], tensors["absmax"]
        pairs = nibble_table(self.table(codes.device)).view(torch.int64)  # each as one number
        found = pairs.flatten().index_select(0, codes.flatten().long()).view(torch.float32)
        return found.view(*absmax.shape, GROUP).mul_(absmax.unsqueeze(-1)).flatten(1)

    def for_kernels(self, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return tensors["weight"], tensors["absmax"], None, nibble_table(self.table())

    def decode_by_kernel(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> Tensor | None:
        found = super().decode_by_kernel(tensors, columns, dtype)
        theirs = bitsandbytes() if found is None else None
        if theirs is None or torch.compiler.is_compiling() or dtype not in (torch.float32, torch.bfloat16):
            return found
        codes, absmax = tensors["weight"], tensors["absmax"]
        shape, values = (len(codes), 2 * codes.size(1)), self.table(codes.device)
        state = theirs.QuantState(absmax.flatten(), shape, values, GROUP, "nf4", dtype)
        return theirs.dequantize_4bit(codes.view(-1, 1), state)[:, :columns].contiguous()


class NF4Double(NF4):
    """NF4 with double quantization: the absmax, less their mean, in int8 with a float32 scale for each 256 of them."""

    def layout(self, rows: int, columns: int) -> Layout:
        layout = super().layout(rows, columns)
        shape, _ = layout["absmax"]
        scales = -(-shape[0] * shape[1] // SCALES)
        more = {"absmax_scale": ((scales,), torch.float32), "absmax_mean": ((1,), torch.float32)}
        return layout | {"absmax": (shape, torch.int8)} | more

    def pack(self, tensors: Tensors) -> Tensors:
        absmax = tensors["absmax"]
        mean = absmax.mean().view(1)
        filled = F.pad((absmax - mean).flatten(), (0, -absmax.numel() % SCALES)).view(-1, SCALES)
        scale = filled.abs().amax(1) / 127
        codes = (filled / divisor(scale).unsqueeze(1)).round_().to(torch.int8)
        codes = codes.flatten()[: absmax.numel()].view(absmax.shape)
        return tensors | {"absmax": codes, "absmax_scale": scale, "absmax_mean": mean}

    def unpack(self, tensors: Tensors) -> Tensors:
        codes = tensors["absmax"]
        scale = tensors["absmax_scale"].repeat_interleave(SCALES, output_size=len(tensors["absmax_scale"]) * SCALES)
        absmax = codes.float().mul_(scale[: codes.numel()].view(codes.shape)).add_(tensors["absmax_mean"])
        return {"weight": tensors["weight"], "absmax": absmax.clamp_(min=0)}


FORMATS: dict[str, Int8] = {"int8": Int8(), "int4": Int4(), "nf4": NF4(), "nf4-dq": NF4Double()}


@cache
def bitsandbytes() -> ModuleType | None:
    """The functions of bitsandbytes, if it is installed and fits this machine: they read NF4 as it is kept here."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    try:
        from bitsandbytes import functional
    except Exception as error:  # however its libraries fail to load, all can be done without it
        print(f"NF4 goes without the faster kernels of bitsandbytes, which fails to load: {error}", file=sys.stderr)
        return None
    return functional


def up_to_bf16(x: Tensor) -> Tensor:
    """The next bfloat16 numbers from positive float32 ones upwards."""
    return (x.contiguous().view(torch.int32) + 0xFFFF & -0x10000).view(torch.float32)


def divisor(scale: Tensor) -> Tensor:
    return scale.clamp(min=torch.finfo(scale.dtype).tiny)


def grouped(w: Tensor) -> Tensor:
    """(rows, groups, GROUP), the last group filled up with the row's last weight, which changes no range."""
    missing = -w.size(1) % GROUP
    return torch.cat((w, w[:, -1:].expand(-1, missing)), 1).unflatten(-1, (-1, GROUP))


def pack_nibbles(codes: Tensor) -> Tensor:
    return codes[:, ::2] << 4 | codes[:, 1::2]


def nibble_table(values: Tensor) -> Tensor:
    """What the two codes of each byte stand for, float32 (256, 2)."""
    return torch.cartesian_prod(values, values)


def unpack_nibbles(pairs: Tensor) -> Tensor:
    return torch.stack((pairs >> 4, pairs & 15), -1).flatten(-2)


def row_chunks(rows: int, columns: int, device: torch.device, cut: int = 1) -> Iterator[slice]:
    """Yield the rows of a weight in chunks, `cut` times smaller than may be."""
    on_cpu = device.type == "cpu" and (torch.compiler.is_compiling() or not policy().simulate_cuda)
    step = max(1, (CPU_PIECE if on_cpu else PIECE) // cut // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


@torch.no_grad()
def encode(
    weight: Tensor,
    name: str,
    dtype: torch.dtype,
    device: torch.device | None = None,
    done: Callable[[Tensor], None] = lambda rows: None,
) -> Tensors:
    """The tensors that stand for a weight (rows, columns) in a format, on `device`; a piece at a time is float32.

    Args:
        dtype: of the tensors whose dtype the format leaves open.
        done: called with each piece of the weight when it is no longer needed.
    """
    quantizer, device = FORMATS[name], device or weight.device
    found: Tensors = {}
    for span in row_chunks(*weight.shape, device, cut=8):  # it takes several tensors of that size
        for key, part in quantizer.encode(weight[span].to(device, torch.float32)).items():
            if key not in found:
                found[key] = part.new_empty(len(weight), *part.shape[1:])
            found[key][span] = part
        done(weight[span])
    layout = quantizer.layout(*weight.shape)
    return {key: tensor.to(layout[key][1] or dtype) for key, tensor in quantizer.pack(found).items()}


@torch.no_grad()
def decode(tensors: Tensors, name: str, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight (rows, columns) that `encode`'s tensors stand for, computed in float32 and rounded once."""
    quantizer = FORMATS[name]
    tensors = quantizer.unpack(tensors)
    codes, weight = tensors["weight"], quantizer.decode_by_kernel(tensors, columns, dtype)
    if weight is None:
        weight = torch.empty(len(codes), columns, dtype=dtype, device=codes.device)
        for span, part in dequantized_chunks(tensors, quantizer, columns, dtype):
            weight[span] = part
    return weight


def dequantized_chunks(
    tensors: Tensors, quantizer: Int8, columns: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """The weight, some rows at a time, of tensors that are unpacked."""
    for span in row_chunks(len(tensors["weight"]), columns, tensors["weight"].device):
        some = {key: tensor[span] for key, tensor in tensors.items()}
        weight = quantizer.decode_by_kernel(some, columns, dtype)
        yield span, quantizer.decode(some)[:, :columns].to(dtype) if weight is None else weight
