"""Gated short convolution (Liquid AI 2025, LFM2 Technical Report): a few tokens of each channel, gated twice."""

import torch
from torch import Tensor

from lit_gpt.model.config import Config
from lit_gpt.model.linear import Linear
from lit_gpt.model.mixers.convolution import CausalConvolution
from lit_gpt.model.mixers.decoding import MixerTape
from lit_gpt.model.mixers.mixer import Recurrence


class ShortConvolution(Recurrence):
    """Gives q * conv(k * v), of three projections of the input."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        n, bias = config.n_embd, config.conv_bias
        self.qkv = Linear(n, 3 * n, bias=bias)  # rows as LFM2 has them: k, q, v
        self.projections = {"query": [(n, 2 * n)], "key": [(0, n)], "value": [(2 * n, 3 * n)]}
        self.channels, self.sizes = n, (n, n, n)
        self.conv = CausalConvolution(n, config.conv_size, bias)
        self.proj = Linear(n, n, bias=bias)

    def recur(
        self, parts: tuple[Tensor, ...], positions: Tensor | None, carried: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        k, q, v = parts
        y, tail = self.conv(k * v, *carried, positions)
        return q * y, (tail,)

    def record(self, tape: MixerTape, x: Tensor, layer: int) -> Tensor:
        """Record the step of one token on a decoding tape; see lit_gpt.model.mixers.decoding."""
        k, q, v = tape.linear(self.qkv, x, "qkv").split(self.sizes, dim=1)
        y = tape.buffer("mixed", self.channels)
        tape.multiply(y, k, v)
        y = tape.convolve(self.conv, y, layer)
        tape.multiply(y, y, q)
        return tape.linear(self.proj, y, "h")

    def blank(self, rows: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (torch.zeros(rows, self.conv.size - 1, self.channels, device=device, dtype=dtype),)
