"""Linear recurrences over tokens: a state that decays and takes in keys and values, read by queries.

With S the state of a head, a_t its decay and u_t what token t adds,

    S_t = a_t S_{t-1} + k_t u_t^T,    o_t = S_t^T q_t,

where u_t is the value (Dao & Gu 2024, Mamba-2, equation 16), or by the delta rule what the state does not hold of it
yet, b_t (v_t - a_t S_{t-1}^T k_t) (Yang et al. 2024, Gated Delta Networks, equation 10). Both functions compute this;
one token by token, the other by products of whole matrices. Sums are float32, or float64 for such input.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # tokens that products take in at once; within a chunk work grows with its square, beyond with its number


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    rate: Tensor | None,
    state: Tensor,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence by whichever function is faster; see `by_chunk`. Narrow input is widened to float32."""
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k, v, decay = (x.to(wide) for x in (q, k, v, decay))
    rate = None if rate is None else rate.to(wide)
    if v.size(1) == 1:
        return by_token(q, k, v, decay, rate, state)
    return by_chunk(q, k, v, decay, rate, state, positions)


def by_token(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence token by token.

    Args:
        q, k: (B, T, groups, state_size).
        v: (B, T, heads, head_size); consecutive heads share a group.
        decay: the logarithm of a, (B, T, heads).
        rate: b, (B, T, heads), for the delta rule; None: values are added as they are.
        state: before the first token, (B, heads, state_size, head_size).

    Returns:
        o like v, and the state after the last token.
    """
    q, k = (x.repeat_interleave(v.size(2) // x.size(2), 2) for x in (q, k))
    outputs = []
    for t in range(v.size(1)):
        state = state * decay[:, t, :, None, None].exp()
        key, new = k[:, t, :, :, None], v[:, t, :, None]  # (B, heads, state_size, 1), (B, heads, 1, head_size)
        if rate is not None:
            new = rate[:, t, :, None, None] * (new - key.mT @ state)
        state = state + key * new
        outputs.append(q[:, t, :, None] @ state)
    return torch.cat(outputs, 2).transpose(1, 2), state


def by_chunk(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor | None, state: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence by chunks of tokens; the arguments and results are those of `by_token`.

    A chunk's tokens see each other as in attention, under their decays, and what came before through the state. What
    they add by the delta rule depends on those before them: a triangular system, solved for all chunks at once.

    Args:
        positions: int64 (T,), 0 where a packed sample begins, at which the state restarts; B is 1 then. None: nowhere.
            Chunks go on across samples: products in which another sample takes part are 0 exactly.
    """
    (_, T, heads, _), groups = v.shape, q.size(2)
    spans = Spans(T, positions, v)
    q, k = (spans.cut(x).transpose(2, 3) for x in (q, k))  # (B, chunks, groups, C, state_size)
    v, decay = spans.cut(v).transpose(2, 3), spans.cut(decay).transpose(2, 3)  # (B, chunks, heads, C, ...)
    total = decay @ spans.seen.to(decay.dtype).mT  # logarithm of the decay since the sample or chunk began
    between = spans.decay_between(decay)
    scores = per_head(q @ k.mT, heads) * between
    inverse = rates = None
    if rate is not None:
        rates = spans.cut(rate).transpose(2, 3).unsqueeze(-1)
        system = per_head(k @ k.mT, heads) * between * rates
        eye = torch.eye(system.size(-1), dtype=system.dtype, device=system.device)
        inverse = torch.linalg.solve_triangular(system, eye.expand_as(system), upper=False, unitriangular=True)
    into = (total.exp() * spans.enters.unsqueeze(1)).unsqueeze(-1)
    out = between[..., -1, :].unsqueeze(-1)  # 0 for tokens of samples that end before
    kept = (total[..., -1].exp() * spans.through).unsqueeze(-1).unsqueeze(-1)
    # a tensor's chunks all at once, for the gradient of each index would be zeros of the whole
    given = [torch.cat((k, q), dim=-2), k, v, scores, into, out, kept]
    solved = [] if inverse is None or rates is None else [inverse @ (rates * v), inverse * (rates * into).mT]
    outputs = []
    for both, key, new, score, entering, leaving, stays, *of_rule in zip(
        *(x.unbind(1) for x in given + solved), strict=True
    ):
        found = by_head(both @ by_group(state, groups), heads)  # of keys and queries in the state
        of_keys, of_queries = found.chunk(2, dim=-2)
        if of_rule:
            new = of_rule[0] - of_rule[1] @ of_keys
        outputs.append(entering * of_queries + score @ new)
        added = by_head(key.mT @ by_group(leaving * new, groups), heads)
        state = stays * state + added
    return torch.stack(outputs, 1).transpose(2, 3).flatten(1, 2)[:, :T], state


class Spans:
    """Cuts a row of T tokens into chunks of C, and says which tokens of a chunk are of one sample.

    Attributes:
        seen: bool (chunks, C, C), whether a token sees another: one of its sample, not after it.
        enters: bool (chunks, C), whether a token is of the sample that the chunk before ended in.
        through: bool (chunks, 1), whether that is the sample that the chunk ends in.
    """

    def __init__(self, T: int, positions: Tensor | None, like: Tensor) -> None:
        size = min(CHUNK, T)
        self.size, self.chunks = size, -(-T // size)
        self.missing = self.chunks * size - T
        sample = torch.zeros(T, dtype=torch.int64, device=like.device)
        if positions is not None:
            sample = (positions == 0).cumsum(0)
        sample = torch.cat((sample, sample[-1:].expand(self.missing))).view(self.chunks, size)
        causal = torch.ones(size, size, dtype=torch.bool, device=like.device).tril()
        self.seen = (sample.unsqueeze(2) == sample.unsqueeze(1)) & causal
        last = sample[:, -1:]
        before = torch.cat((sample[:1, :1], last[:-1]))
        self.enters, self.through = sample == before, before == last

    def decay_between(self, decay: Tensor) -> Tensor:
        """Return by how much what a token added has decayed when another sees it, (B, chunks, heads, C, C).

        It is the sum of the logarithms between the two, not a difference of sums from the start on, whose gradient
        would be a small difference of large numbers.

        Args:
            decay: logarithms (B, chunks, heads, C).
        """
        after = torch.ones(self.size, self.size, dtype=torch.bool, device=decay.device).triu(1)
        sums = decay.unsqueeze(-2).masked_fill(~after, 0).cumsum(-1).mT  # of the tokens after j up to i, in i and j
        return sums.masked_fill(~self.seen.unsqueeze(1), -torch.inf).exp()

    def cut(self, x: Tensor) -> Tensor:
        """Return x (B, T, ...) as (B, chunks, C, ...), with zeros, which change no state, after the last token."""
        if self.missing:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, self.missing))
        return x.unflatten(1, (self.chunks, self.size))


def per_head(x: Tensor, heads: int) -> Tensor:
    """Repeat (B, chunks, groups, ...) for each head of a group."""
    return x if x.size(2) == heads else x.repeat_interleave(heads // x.size(2), 2)


def by_group(x: Tensor, groups: int) -> Tensor:
    """Put the heads of a group side by side: (B, heads, n, size) to (B, groups, n, heads of a group * size)."""
    return x if x.size(1) == groups else x.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3)


def by_head(x: Tensor, heads: int) -> Tensor:
    """Undo `by_group`."""
    own = heads // x.size(1)
    return x if own == 1 else x.unflatten(3, (own, -1)).transpose(2, 3).flatten(1, 2)
