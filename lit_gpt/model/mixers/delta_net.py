"""Gated delta net (Yang et al. 2024, Gated Delta Networks: Improving Mamba2 with Delta Rule), as Qwen3-Next has it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.model.config import Config
from lit_gpt.model.linear import Linear
from lit_gpt.model.mixers import recurrence
from lit_gpt.model.mixers.convolution import CausalConvolution
from lit_gpt.model.mixers.decoding import MixerTape
from lit_gpt.model.mixers.mixer import Recurrence
from lit_gpt.model.norms import RMSNorm


class GatedDeltaNet(Recurrence):
    """Writes to its state what that does not hold yet of a value, at a rate and under a decay that the token sets."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.head_size = config.state_heads, config.state_head_size
        self.groups, self.state_size = config.state_groups, config.state_size
        keys, values = self.groups * self.state_size, self.heads * self.head_size
        self.convolved = (keys, keys, values)
        # rows of the queries, keys and values, of the output's gate, of the rate and the decay of each head
        self.sizes = (sum(self.convolved), values, self.heads, self.heads)
        self.qkv = Linear(config.n_embd, sum(self.sizes), bias=False)
        gate = (sum(self.convolved), sum(self.convolved) + values)
        self.projections = {
            "query": [(0, keys), gate],
            "key": [(keys, 2 * keys)],
            "value": [(2 * keys, 2 * keys + values)],
        }
        self.conv = CausalConvolution(sum(self.convolved), config.conv_size, config.conv_bias)
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(0.01, 16).log())
        self.dt_bias = nn.Parameter(torch.ones(self.heads))
        self.norm = RMSNorm(self.head_size, config.norm_eps)
        self.proj = Linear(values, config.n_embd, bias=False)

    def recur(
        self, parts: tuple[Tensor, ...], positions: Tensor | None, carried: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        (qkv, gate, rate, decay), (state, tail) = parts, carried
        qkv, tail = self.conv(qkv, tail, positions)
        q, k, v = F.silu(qkv).split(self.convolved, dim=-1)
        q, k = (unit(x.unflatten(-1, (self.groups, -1))) for x in (q, k))
        v = v.unflatten(-1, (self.heads, -1))
        with torch.autocast(v.device.type, enabled=False):
            decay, A_log, dt_bias = (x.to(state.dtype) for x in (decay, self.A_log, self.dt_bias))
            decay = -A_log.exp() * F.softplus(decay + dt_bias)
            y, state = recurrence.run(q * self.state_size**-0.5, k, v, decay, rate.sigmoid(), state, positions)
        y = self.norm(y.to(gate.dtype)).to(gate.dtype) * F.silu(gate.unflatten(-1, (self.heads, -1)))
        return y.flatten(2), (state, tail)

    def record(self, tape: MixerTape, x: Tensor, layer: int) -> Tensor:
        """Record the step of one token on a decoding tape; see lit_gpt.model.mixers.decoding."""
        qkv = tape.linear(self.qkv, x, "qkv")
        convolved, gate, rate, decay = qkv.split(self.sizes, dim=1)
        convolved = tape.convolve(self.conv, convolved, layer)
        tape.activate(convolved, "silu")
        inputs = *convolved[0].split(self.convolved), convolved.size(1)
        sizes = self.heads, self.groups, self.state_size, self.head_size
        rates = rate[0], decay[0], qkv.size(1), self.A_log.float().exp(), self.dt_bias.float()
        y = tape.buffer("mixed", self.heads * self.head_size)
        tape.add("delta_rule", y, *inputs, *sizes, *rates, layer)
        tape.norm(self.norm, y, None, self.heads)
        tape.multiply(y, y, gate, "swish")
        return tape.linear(self.proj, y, "h")

    def blank(self, rows: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        wide = torch.promote_types(dtype, torch.float32)
        state = torch.zeros(rows, self.heads, self.state_size, self.head_size, device=device, dtype=wide)
        return state, torch.zeros(rows, self.conv.size - 1, sum(self.convolved), device=device, dtype=dtype)


def unit(x: Tensor) -> Tensor:
    """Return x (..., size) at length 1, in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
