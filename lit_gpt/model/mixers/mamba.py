"""Mamba (Gu & Dao 2023, Mamba: Linear-Time Sequence Modeling with Selective State Spaces), as Falcon-Mamba has it.

With S the state (channels, state_size) and s_t the time steps of the channels,

    S_t = exp(s_t A) S_{t-1} + (s_t v_t) k_t^T,    o_t = S_t q_t.

The decay differs from one element of the state to the next, so that no product of matrices computes this; the chunked
form takes one token of all chunks at a time, and then what the chunks before have left.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.model.config import Config
from lit_gpt.model.linear import Linear
from lit_gpt.model.mixers.convolution import CausalConvolution
from lit_gpt.model.mixers.decoding import MixerTape
from lit_gpt.model.mixers.mixer import Recurrence
from lit_gpt.model.norms import PlainRMSNorm


class Mamba(Recurrence):
    """Makes keys, queries and time steps of the convolved values, and norms them without weights.

    The paper's B, C and x are keys, queries and values.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.channels, self.state_size, self.rank = config.state_heads, config.state_size, config.step_rank
        self.eps = config.state_norm_eps
        # rows of the values, and of the output's gate
        self.sizes = (self.channels, self.channels)
        self.qkv = Linear(config.n_embd, sum(self.sizes), bias=config.bias)
        self.projections = {"query": [(self.channels, 2 * self.channels)], "value": [(0, self.channels)]}
        self.conv = CausalConvolution(self.channels, config.conv_size, config.conv_bias)
        self.x_proj = Linear(self.channels, self.rank + 2 * self.state_size, bias=False)
        self.dt_proj = Linear(self.rank, self.channels, bias=True)
        self.A_log = nn.Parameter(torch.arange(1, self.state_size + 1).float().log().repeat(self.channels, 1))
        self.D = nn.Parameter(torch.ones(self.channels))
        self.proj = Linear(self.channels, config.n_embd, bias=config.bias)

    def recur(
        self, parts: tuple[Tensor, ...], positions: Tensor | None, carried: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        (v, gate), (state, tail) = parts, carried
        v, tail = self.conv(v, tail, positions)
        v = F.silu(v)
        made = self.x_proj(v).split((self.rank, self.state_size, self.state_size), dim=-1)
        step, k, q = (F.rms_norm(x, x.shape[-1:], eps=self.eps) for x in made)
        step = self.dt_proj(step)
        with torch.autocast(v.device.type, enabled=False):
            A = -self.A_log.to(state.dtype).exp()
            step, q, k, wide = (x.to(state.dtype) for x in (F.softplus(step), q, k, v))
            y, state = scan(q, k, wide, step, A, state, positions)
            y = y + self.D.to(state.dtype) * wide
        return y.to(gate.dtype) * F.silu(gate), (state, tail)

    def record(self, tape: MixerTape, x: Tensor, layer: int) -> Tensor:
        """Record the step of one token on a decoding tape; see lit_gpt.model.mixers.decoding."""
        qkv = tape.linear(self.qkv, x, "qkv")
        v, gate = qkv.split(self.sizes, dim=1)
        v = tape.convolve(self.conv, v, layer)
        tape.activate(v, "silu")
        made = tape.linear(self.x_proj, v, "made")
        step, k, q = made.split((self.rank, self.state_size, self.state_size), dim=1)
        step = tape.norm(PlainRMSNorm(self.rank, self.eps), step, "step")
        for x in (k, q):
            tape.norm(PlainRMSNorm(self.state_size, self.eps), x, None)
        step = tape.linear(self.dt_proj, step, "steps")
        y, A = tape.buffer("mixed", self.channels), -self.A_log.float().exp()
        sizes = made.size(1), self.channels, self.state_size
        tape.add("selective_scan", y, q[0], k[0], *sizes, v, step, A, self.D.float(), layer)
        tape.multiply(y, y, gate, "swish")
        return tape.linear(self.proj, y, "h")

    def blank(self, rows: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        wide = torch.promote_types(dtype, torch.float32)
        state = torch.zeros(rows, self.channels, self.state_size, device=device, dtype=wide)
        return state, torch.zeros(rows, self.conv.size - 1, self.channels, device=device, dtype=dtype)


def scan(
    q: Tensor, k: Tensor, v: Tensor, step: Tensor, A: Tensor, state: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence.

    Args:
        q, k: (B, T, state_size).
        v, step: (B, T, channels).
        A: (channels, state_size), negative.
        state: before the first token, (B, channels, state_size).
        positions: int64 (T,), 0 where a packed sample begins, at which the state restarts; None: nowhere.

    Returns:
        o like v, and the state after the last token.
    """
    T = v.size(1)
    size = math.ceil(T**0.5)  # of a chunk: so many turns within chunks, and as many from one to the next
    chunks, missing = -(-T // size), -T % size

    def cut(
        x: Tensor,
    ) -> list[Tensor]:  # each token of the chunks: (B, chunks, ...); zeros, which change no state, after all
        return list(F.pad(x, (0, 0, 0, missing)).unflatten(1, (chunks, size)).unbind(2))

    starts = v.new_zeros(T, 1) if positions is None else (positions == 0).to(v.dtype).unsqueeze(1)
    inputs = map(cut, (q, k, v * step, step, starts.expand(len(v), -1, -1)))
    outputs, decays, queries = [], [], []
    within = torch.zeros(1, dtype=v.dtype, device=v.device)
    decayed = torch.ones(1, dtype=v.dtype, device=v.device)
    for query, key, value, time, start in zip(*inputs, strict=True):
        decay = (time.unsqueeze(-1) * A).exp() * (1 - start).unsqueeze(-1)
        within, decayed = decay * within + value.unsqueeze(-1) * key.unsqueeze(-2), decay * decayed
        outputs.append((within @ query.unsqueeze(-1)).squeeze(-1))
        decays.append(decayed)
        queries.append(query)
    before = []
    for kept, added in zip(decayed.unbind(1), within.unbind(1), strict=True):
        before.append(state)
        state = kept * state + added
    entering = torch.stack(before, 1)
    y = [o + ((d * entering) @ q.unsqueeze(-1)).squeeze(-1) for o, d, q in zip(outputs, decays, queries, strict=True)]
    return torch.stack(y, 2).flatten(1, 2)[:, :T], state
