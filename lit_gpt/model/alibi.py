"""ALiBi (Press et al. 2022): in the place of positions, a bias on the scores that grows with the distance.

model/attention.py adds it, and in the fast decoding step generation/steps/tape.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def with_alibi(
    q: Tensor, k: Tensor, v: Tensor, scale: float, positions: Tensor, rounded: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v with 8 more elements per head, which add ALiBi's bias to the scores (Press et al. 2022).

    The bias is -slope * (query's position - key's). Softmax does not see what all keys have in common, so it may be
    slope * key's position as well; bfloat16 holds a position exactly in two parts, up to 65,536. So any kernel serves,
    and no mask of T x S is made.

    Args:
        q: (B, n_head, T, head_size). k, v: (B, n_query_groups, S, head_size).
        scale: what multiplies the scores.
        positions: int64 (S,), where each key is.
        rounded: the bias is rounded to bfloat16, and multiplied by `scale` too, as in Falcon-RW; one key for each head.
    """
    if rounded:
        biases = alibi_slopes(q.size(1), q.device).bfloat16()[:, None] * positions  # (n_head, S)
        return joined(q, k, v, F.pad(q.new_ones(1), (0, 7)), F.pad(biases.to(k.dtype).unsqueeze(-1), (0, 7)))
    slopes = (alibi_slopes(q.size(1), q.device) / scale).to(q.dtype)
    far, near = (positions // 256 * 256).to(k.dtype), (positions % 256).to(k.dtype)
    # zeros besides: flash attention wants as many elements in all three, and a multiple of 8
    on_q = F.pad(torch.stack((slopes, slopes), dim=-1), (0, 6))
    on_k = F.pad(torch.stack((far, near), dim=-1), (0, 6))
    return joined(q, k, v, on_q.unsqueeze(1), on_k)


def joined(q: Tensor, k: Tensor, v: Tensor, on_q: Tensor, on_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v with 8 more elements per head."""
    q = torch.cat((q, on_q.expand(*q.shape[:3], 8)), dim=-1)
    k = torch.cat((k, on_k.expand(*k.shape[:3], 8)), dim=-1)
    return q, k, F.pad(v, (0, 8))


def alibi_slopes(n_head: int, device: torch.device | None = None) -> Tensor:
    """Return each head's slope, float32 (n_head,): 2^(-8 i / n) for the i-th of n heads if n is a power of two.

    If n lies between two powers, the slopes of the lower come first, then every other one of the upper.
    """
    n = 2 ** math.ceil(math.log2(n_head))
    slopes = torch.exp2(torch.arange(1, n + 1, device=device) * (-8 / n))
    return slopes if n == n_head else torch.cat((slopes[1::2], slopes[::2]))[:n_head]
