"""Compare kernels with float64: the section of gpu_check.py on what training takes of lit_gpt/kernels/cuda.

Each goes forward and backward beside the plain formula, and on a GPU is timed; a dry run takes Triton's interpreter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_common import Check, distance, timed
from torch import Tensor

from lit_gpt.kernels import attention, functional, norms
from lit_gpt.kernels.attention import ScoreParams
from lit_gpt.kernels.cuda.launch import recorded
from lit_gpt.kernels.dropout import draw
from lit_gpt.kernels.policy import use_policy
from lit_gpt.model import sdpa
from lit_gpt.model.loss import summed_cross_entropy
from lit_gpt.model.packed_inputs import Segments

# How far results may be from the exact ones, relative to their norm: rounding, once or twice, to 8 bits; and to 24 of
# them, by products of three parts of 11 bits each.
BOUNDS = {torch.bfloat16: 2**-7, torch.float32: 3e-5}


@dataclass
class Case:
    """An operation, which kernels serve or formulas by its tensors' dtype, on inputs of these shapes.

    Attributes:
        own: dtypes of inputs by position, where they keep one of their own, in float64 excepted.
        frozen: positions of inputs without gradients.
    """

    function: Callable[..., Tensor]
    shapes: list[tuple[int, ...]]
    own: tuple[int, ...] = ()
    frozen: tuple[int, ...] = ()

    def inputs(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        torch.manual_seed(0)
        made = [torch.randn(shape).bfloat16() for shape in self.shapes]
        given = [x.to(device, torch.float32 if i in self.own and dtype != torch.float64 else dtype)
                 for i, x in enumerate(made)]  # fmt: skip
        return [x.requires_grad_(i not in self.frozen) for i, x in enumerate(given)]

    def run(self, given: list[Tensor]) -> list[Tensor]:
        """Return the result and all gradients."""
        y = self.function(*given)
        torch.manual_seed(1)
        above = torch.randn(y.shape).bfloat16().to(y.device, y.dtype)
        return [y, *torch.autograd.grad(y, [x for x in given if x.requires_grad], above)]


class Head(torch.nn.Module):
    """A head whose logits are its input."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.out_features = size

    def forward(self, x: Tensor) -> Tensor:
        return x * 1


def cases(rows: int, size: int, heads: int, vocabulary: int) -> dict[str, Case]:
    """Return the cases by name.

    Args:
        rows: tokens.
        size: n_embd, of heads of 64 and one group of keys.
    """
    keys, positions = draw(torch.tensor(0), torch.arange(rows)), torch.arange(rows).unsqueeze(1)
    angles = (positions / 10_000 ** (torch.arange(32) / 32)).repeat(1, 2)
    labels, q = torch.arange(rows) % vocabulary, heads * 64

    def lora(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        parts = [(0, q), (q + 64, q + 128)]
        return functional.low_rank_update(y * 1, x, A, B, parts, 2.0, 0.1, keys.to(x.device))

    def rotation(qkv: Tensor) -> Tensor:
        cos, sin = (f(angles).bfloat16().to(qkv) for f in (torch.cos, torch.sin))
        return torch.cat(functional.rotate_split(qkv * 1, cos, sin, heads + 1, 64, [q, 64, 64]), dim=-1)

    def stream(x: Tensor, added: Tensor, w: Tensor) -> Tensor:
        return torch.cat(norms.add_and_rms_norm(x, added, 1.0, w, 1e-5), dim=-1)

    def loss(logits: Tensor) -> Tensor:
        return summed_cross_entropy(Head(vocabulary), logits, labels.to(logits.device))

    wide, gated = (rows, size), functional.ACTIVATIONS
    found = {
        "LayerNorm": Case(lambda x, w, b: norms.layer_norm(x, w, b, 1e-5), [wide, (size,), (size,)]),
        "RMSNorm": Case(lambda x, w: norms.rms_norm(x, w, 1e-5), [wide, (size,)], frozen=(1,)),
        "RMSNorm of Gemma": Case(lambda x, w: norms.rms_norm(x, w, 1e-5, 1.0), [wide, (size,)]),
        "residual and RMSNorm": Case(stream, [wide, wide, (size,)]),
        "LoRA": Case(lora, [(rows, q + 128), wide, (16, size), (q + 64, 8)], own=(2, 3)),
        "rotation": Case(rotation, [(1, rows, q + 128)]),
        "sum of three": Case(functional.sum_of_three, [wide] * 3),
        "scale and shift": Case(functional.scaled, [wide, (size,), (size,)], own=(1, 2)),
        "cross-entropy": Case(loss, [(rows, vocabulary)]),
    }
    return found | {f"gated {name}": Case(lambda x, f=f: functional.gated(x, f), [(rows, 2 * size)])
                    for name, f in gated.items()}  # fmt: skip


def kernels(check: Check) -> dict[str, Any]:
    """Compare every kernel with float64 on the CPU, over memory filled with NaN; on a GPU time it too."""
    result: dict[str, Any] = {}
    sizes = (33, 128, 2, 320) if check.dry else (1024, 4544, 71, 65024)
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills fresh memory with NaN
    try:
        with use_policy(simulate_cuda=True, cpp=False):
            for name, case in cases(*sizes).items():
                exact = case.run(case.inputs(torch.float64, "cpu"))
                for dtype, bound in BOUNDS.items():
                    given = case.inputs(dtype, check.device)
                    with recorded() as launches:
                        off = max(distance(a, b) for a, b in zip(case.run(given), exact, strict=True))
                    key = f"{name} {str(dtype).removeprefix('torch.')}"
                    result[key] = f"off by {off:.1e}"
                    check.require(off < bound, f"{key}: differs from float64 by {off:.3g}")
                    check.require(bool(launches), f"{key}: no kernel was launched")
                    if not check.dry:
                        result[key] += f", {1e6 * timed(lambda c=case, g=given: c.run(g), 20):.0f} us both ways"
    finally:
        torch.use_deterministic_algorithms(False)
    return result | ({} if check.dry else flash(check, distance))


def flash(check: Check, distance: Callable[[Any, Any], float]) -> dict[str, Any]:
    """Compare attention of packed samples with float64 on the CPU: flash attention of grouped keys, windows and head
    sizes, and flex_attention, which is compiled for it, of a soft cap and of sinks."""
    result, lengths = {}, (300, 1, 130, 93)
    segments = Segments.of(lengths, torch.device(check.device))
    shapes = [(71, 1, 64, None, None), (8, 2, 128, None, None), (8, 8, 128, 50, None), (4, 1, 256, None, None)]
    for heads, groups, size, window, special in [*shapes, (8, 4, 256, 50, "cap"), (64, 8, 64, 128, "sinks")]:
        qkv = torch.randn(1, sum(lengths), (heads + 2 * groups) * size).bfloat16()
        scores, found = ScoreParams(size**-0.5, window, 2.0 if special == "cap" else None), []
        for x in (qkv.to(check.device), qkv.double()):
            x.requires_grad_()
            parts = x.view(1, -1, heads + 2 * groups, size).split([heads, groups, groups], dim=2)
            q, k, v = (part.transpose(1, 2) for part in parts)
            on_device = x.device.type != "cpu"
            sinks = torch.linspace(-1, 1, heads).to(x) if special == "sinks" else None
            y = (sdpa.attend_packed(q, k, v, scores, segments, sinks) if on_device
                 else attention.attention(q, k, v, scores, lengths, sinks))  # fmt: skip
            (grad,) = torch.autograd.grad(y.float().square().sum(), x)
            found.append((y, grad))
        off = max(distance(a, b) for a, b in zip(*found, strict=True))
        parts = [f"{heads}/{groups} heads of {size}", f"window {window}" if window else "", special]
        name = f"{'flex' if special else 'flash'} {', '.join(filter(None, parts))}"
        result[name] = f"off by {off:.1e}"
        check.require(off < 0.02, f"{name}: differs from float64 by {off:.3g}")
    return result
