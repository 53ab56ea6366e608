"""Mamba-2 (Dao & Gu 2024, Transformers are SSMs), as Granite 4, Nemotron-H and Falcon-H1 have it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.model.config import Config
from lit_gpt.model.linear import Linear
from lit_gpt.model.mixers import recurrence
from lit_gpt.model.mixers.convolution import CausalConvolution
from lit_gpt.model.mixers.decoding import MixerTape
from lit_gpt.model.mixers.mixer import Recurrence
from lit_gpt.model.norms import GroupedRMSNorm, RMSNorm
from lit_gpt.model.rope import Rotation


class Mamba2(Recurrence):
    """Adds to its state each value as far as the token's time step goes, by which the state also decays.

    The paper's B, C and x are keys, queries and values.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.head_size = config.state_heads, config.state_head_size
        self.groups, self.state_size = config.state_groups, config.state_size
        keys, values = self.groups * self.state_size, self.heads * self.head_size
        self.convolved = (values, keys, keys)
        # rows of the output's gate, of the values, keys and queries, of the time step of each head
        self.sizes = (values, sum(self.convolved), self.heads)
        self.qkv = Linear(config.n_embd, sum(self.sizes), bias=False)
        self.projections = {
            "query": [(0, values), (2 * values + keys, 2 * values + 2 * keys)],
            "key": [(2 * values, 2 * values + keys)],
            "value": [(values, 2 * values)],
        }
        self.conv = CausalConvolution(sum(self.convolved), config.conv_size, config.conv_bias)
        self.A_log = nn.Parameter(torch.arange(1, self.heads + 1).float().log())
        self.dt_bias, self.D = nn.Parameter(torch.ones(self.heads)), nn.Parameter(torch.ones(self.heads))
        self.min_step, parts, eps = config.min_step, config.state_norm_groups, config.norm_eps
        self.norm = gate_norm(values, eps, parts)
        scales = config.state_scales
        self.scales = tuple(zip(scales, (values, values, keys, keys, self.heads), strict=True)) if scales else ()
        self.proj = Linear(values, config.n_embd, bias=False)

    def project(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, ...]:
        parts = super().project(x, rotation)
        if not self.scales:
            return parts
        own = torch.cat(parts, dim=-1).split([size for _, size in self.scales], dim=-1)
        gate, *vkq, step = (part * scale for part, (scale, _) in zip(own, self.scales, strict=True))
        return gate, torch.cat(vkq, dim=-1), step

    def recur(
        self, parts: tuple[Tensor, ...], positions: Tensor | None, carried: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        (gate, vkq, step), (state, tail) = parts, carried
        vkq, tail = self.conv(vkq, tail, positions)
        v, k, q = F.silu(vkq).split(self.convolved, dim=-1)
        q, k = (x.unflatten(-1, (self.groups, -1)) for x in (q, k))
        v = v.unflatten(-1, (self.heads, -1))
        with torch.autocast(v.device.type, enabled=False):
            step, A_log, dt_bias, D, v = (x.to(state.dtype) for x in (step, self.A_log, self.dt_bias, self.D, v))
            step = F.softplus(step + dt_bias).clamp(min=self.min_step)
            y, state = recurrence.run(q, k, v * step.unsqueeze(-1), -A_log.exp() * step, None, state, positions)
            y = y + D.unsqueeze(-1) * v
        return self.norm(y.flatten(2).to(gate.dtype) * F.silu(gate)), (state, tail)

    def record(self, tape: MixerTape, x: Tensor, layer: int) -> Tensor:
        """Record the step of one token on a decoding tape; see lit_gpt.model.mixers.decoding."""
        qkv = tape.linear(self.qkv, x, "qkv")
        if self.scales:
            scales = torch.cat([torch.full((size,), scale) for scale, size in self.scales])
            tape.scale(qkv, scales, torch.zeros_like(scales))
        gate, convolved, step = qkv.split(self.sizes, dim=1)
        convolved = tape.convolve(self.conv, convolved, layer)
        tape.activate(convolved, "silu")
        v, k, q = convolved[0].split(self.convolved)
        sizes = self.heads, self.groups, self.state_size, self.head_size
        A_log, dt_bias, D = (x.float() for x in (self.A_log, self.dt_bias, self.D))
        steps = step[0], qkv.size(1), A_log.exp(), dt_bias, float(self.min_step)
        y = tape.buffer("mixed", self.heads * self.head_size)
        tape.add("state_space", y, q, k, v, convolved.size(1), *sizes, *steps, D, layer)
        tape.multiply(y, y, gate, "swish")
        tape.norm(self.norm, y, None, self.norm.groups if isinstance(self.norm, GroupedRMSNorm) else 1)
        return tape.linear(self.proj, y, "h")

    def blank(self, rows: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        wide = torch.promote_types(dtype, torch.float32)
        state = torch.zeros(rows, self.heads, self.state_size, self.head_size, device=device, dtype=wide)
        return state, torch.zeros(rows, self.conv.size - 1, sum(self.convolved), device=device, dtype=dtype)


def gate_norm(size: int, eps: float, groups: int) -> nn.Module:
    """Return the norm of the gated output, in so many groups; 0: none."""
    if not groups:
        return nn.Identity()
    return RMSNorm(size, eps) if groups == 1 else GroupedRMSNorm(size, eps, groups)
