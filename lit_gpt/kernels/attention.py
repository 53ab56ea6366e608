"""Causal attention by products of whole matrices, with its gradients: by a kernel of ops.py where there is one for the
tensors at hand, else by torch's operations, block by block. tests/kernels/test_functional.py holds both against the
plain formula.

On a CPU this takes half the time of torch's scaled_dot_product_attention, whose backward pass is slow there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_gpt.kernels import ops
from lit_gpt.kernels.functional import apply_or_forward
from lit_gpt.kernels.linear import arithmetic
from lit_gpt.kernels.policy import WIDE_VECTORS, policy
from lit_gpt.kernels.trials import Sample, both_passes, ramp, sampled

# Queries that attend at a time, so that what is computed of the masked upper triangle is little, and their scores fit
# a cache.
QUERY_BLOCK = 128
# Samples up to this length are short: their probabilities, which grow with its square, are kept.
SHORT = 512


@dataclass(frozen=True)
class ScoreParams:
    """Says how a query scores the keys, before the softmax.

    Attributes:
        scale: multiplies the product of query and key.
        window: how many positions a query sees, its own included; None: all before it.
        softcap: c, by which a score s becomes c * tanh(s / c) (Gemma Team 2024, Gemma 2); None: it does not.
        chunk: positions from one multiple of it to the next see each other alone (Meta 2025, Llama 4); None: they do
            not. lit_gpt.model.sdpa cuts samples by it, before a kernel has them.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    chunk: int | None = None


def attention(
    q: Tensor, k: Tensor, v: Tensor, scores: ScoreParams, lengths: tuple[int, ...], sinks: Tensor | None = None
) -> Tensor:
    """Compute causal attention within each of the samples that make up a row.

    Args:
        q: (B, n_head, T, head_size). k, v: (B, n_query_groups, T, head_size).
        lengths: how long the samples are; their sum is T.
        sinks: (n_head,), the score of one more key of each head, which all queries see and which has no value.

    Returns:
        (B, n_head, T, head_size). Scores and softmax are float32, or float64 for such input.
    """
    if sinks is None and (
        reads_prompts(q, k, v, scores) or (scores.softcap is None and ops.supports_attention(q, k, v))
    ):
        return apply_or_forward(_AttentionKernel, q, k, v, scores, lengths)
    if (dtype := arithmetic(q.device, q.dtype)) != q.dtype:
        return attention(q.to(dtype), k.to(dtype), v.to(dtype), scores, lengths, sinks).to(q.dtype)
    return apply_or_forward(_Attention, q, k, v, sinks, scores, lengths)


@sampled("attention")
def _attention_sample(dtype: torch.dtype, size: int, heads: int) -> Sample:
    """Take a short sample and few heads, as a layer's are all alike."""
    lengths, heads = (SHORT // 2,), min(heads, 4)
    call = partial(attention, scores=ScoreParams(size**-0.5), lengths=lengths)
    return both_passes(call, *(ramp(1, n, sum(lengths), size, dtype=dtype) for n in (heads, 1, 1)))


def reads_prompts(q: Tensor, k: Tensor, v: Tensor, scores: ScoreParams) -> bool:
    """Return whether a kernel computes attention like this without gradients.

    Then q may have the last queries of a single sample alone, whose length is that of k.
    """
    if torch.is_grad_enabled() or scores.softcap is not None or policy().fused is False or not WIDE_VECTORS:
        return False
    alike = all(x.stride(-1) == 1 and x.size(-1) == q.size(-1) and x.dtype == q.dtype for x in (q, k, v))
    return alike and ops.supports_on(q.device, q.dtype)


class _AttentionKernel(torch.autograd.Function):
    """Keeps q, k, v and of each query the sum of its exponentials."""

    @staticmethod
    def forward(ctx, q, k, v, scores, lengths):
        ctx.rest = scores.scale, scores.window or sum(lengths), list(lengths)
        y, log_sums = ops.attention(q, k, v, *ctx.rest)
        ctx.save_for_backward(q, k, v, log_sums)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, log_sums = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        return *ops.attention_backward(grad, q, k, v, log_sums, *ctx.rest), None, None


class _Attention(torch.autograd.Function):
    """Keeps q, k and v; and the probabilities of short samples, while those of longer ones are computed again, and with
    a soft cap all.

    All is laid out by group of heads that share keys and values, queries of one position next to each other, so that
    queries and keys of a block are slices: q as (B * n_query_groups, T * heads of a group, head_size).
    """

    @staticmethod
    def forward(ctx, q, k, v, sinks, scores, lengths):
        ctx.scores, ctx.lengths, kept = scores, lengths, []
        with torch.autocast(q.device.type, enabled=False):
            values, y = _by_group(v, v).to(_wide(v)), torch.empty_like(_by_group(q, k))
            probabilities = _Probabilities(q, k, scores, sinks)
            for block in _blocks(lengths, scores):
                p, _ = probabilities.of(block)
                y[:, probabilities.rows(block)] = p @ values[:, block.keys]
                kept += [p.to(q.dtype)] if block.kept else []
        ctx.save_for_backward(q, k, v, sinks, *kept)
        return _by_head(y, q)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, sinks, *kept = ctx.saved_tensors
        queries, keys_, values, grad = (_by_group(x, k) for x in (q, k, v, grad))
        q_grad = torch.empty_like(queries)
        k_grad, v_grad = (torch.zeros_like(x, dtype=_wide(x)) for x in (keys_, values))
        probabilities, kept = _Probabilities(q, k, ctx.scores, sinks), iter(kept)
        sinks_grad = None if sinks is None else torch.zeros_like(sinks, dtype=_wide(sinks))
        for block in _blocks(ctx.lengths, ctx.scores):
            p, slope = (next(kept), None) if block.kept else probabilities.of(block)
            p = p.to(q.dtype)
            rows, keys = probabilities.rows(block), block.keys
            v_grad[:, keys] += p.mT @ grad[:, rows]
            p_grad = grad[:, rows] @ values[:, keys].mT
            scores_grad = torch._softmax_backward_data(p_grad, p, -1, p.dtype)
            if sinks_grad is not None:  # the sink has what is left of the probability, and no value
                of_sink = (p.sum(-1) - 1) * (p_grad * p).sum(-1)
                sinks_grad += of_sink.view(q.size(0), k.size(1), -1, probabilities.heads).sum((0, 2)).flatten()
            scores_grad = scores_grad if slope is None else scores_grad.mul_(slope)
            q_grad[:, rows] = scores_grad @ keys_[:, keys]
            k_grad[:, keys] += scores_grad.mT @ queries[:, rows]
        scale = ctx.scores.scale
        grads = (q_grad.mul_(scale), q), (k_grad.mul_(scale), k), (v_grad, v)
        return (
            *(_by_head(x, like) for x, like in grads),
            None if sinks_grad is None else sinks_grad.to(sinks.dtype),
            None,
            None,
        )


@dataclass(frozen=True)
class _Block:
    """Holds queries from `begin` to `end`, which see keys from `first` on, and whether their probabilities are kept."""

    begin: int
    end: int
    first: int
    kept: bool

    @property
    def keys(self) -> slice:
        return slice(self.first, self.end)


def _blocks(lengths: tuple[int, ...], scores: ScoreParams) -> Iterator[_Block]:
    start, window = 0, scores.window
    for length in lengths:
        n = -(-length // QUERY_BLOCK)
        for i in range(n):
            begin, end = start + length * i // n, start + length * (i + 1) // n
            first = start if window is None else max(start, begin - window + 1)
            yield _Block(begin, end, first, length <= SHORT and scores.softcap is None)
        start += length


class _Probabilities:
    """Computes the softmax of the scores of a block's queries, in float32 or wider."""

    def __init__(self, q: Tensor, k: Tensor, scores: ScoreParams, sinks: Tensor | None) -> None:
        self.q, self.k, self.sinks, self.heads = q, k, sinks, q.size(1) // k.size(1)
        self.scale, self.window, self.softcap = scores.scale, scores.window, scores.softcap

    @cached_property
    def scaled(self) -> tuple[Tensor, Tensor]:
        wide = _wide(self.q)
        return _by_group(self.q, self.k).to(wide) * self.scale, _by_group(self.k, self.k).to(wide)

    def rows(self, block: _Block) -> slice:
        return slice(block.begin * self.heads, block.end * self.heads)

    def of(self, block: _Block) -> tuple[Tensor, Tensor | None]:
        """Return the probabilities of a block, and the soft cap's slope at each score, if there is one."""
        queries, keys = self.scaled
        n, seen, before = block.end - block.begin, block.end - block.first, block.begin - block.first
        scores, slope = queries[:, self.rows(block)] @ keys[:, block.keys].mT, None
        if self.softcap is not None:
            scores = scores.div_(self.softcap).tanh_()
            slope = 1 - scores.square()
            scores = scores.mul_(self.softcap)
        by_query = scores.view(-1, n, self.heads, seen)
        by_query[..., before:] += self.later[:n, :n].unsqueeze(1)
        if self.window is not None and seen > self.window:
            by_query += scores.new_full((n, seen), -torch.inf).tril_(before - self.window).unsqueeze(1)
        if self.sinks is None:
            return scores.softmax(-1), slope
        groups = self.sinks.to(scores.dtype).view(1, -1, 1, self.heads).expand(self.q.size(0), -1, n, -1)
        return torch.cat((scores, groups.reshape(-1, n * self.heads, 1)), dim=-1).softmax(-1)[..., :seen], slope

    @cached_property
    def later(self) -> Tensor:
        """Return the mask of a block: -inf where a key comes after the query, else 0."""
        shape = QUERY_BLOCK, QUERY_BLOCK
        return torch.full(shape, -torch.inf, dtype=_wide(self.q), device=self.q.device).triu_(1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _by_group(x: Tensor, k: Tensor) -> Tensor:
    """Return x (B, heads, T, head_size) by groups of k, as (B * n_query_groups, T * heads of a group, head_size)."""
    B, G, T, size = k.shape
    return x.view(B, G, -1, T, size).transpose(2, 3).reshape(B * G, -1, size)


def _by_head(x: Tensor, like: Tensor) -> Tensor:
    """Return x in the shape of `like` (B, n_head, T, head_size), in memory as (B, T, n_head, head_size)."""
    B, H, T, size = like.shape
    heads = torch.empty(B, T, H, size, dtype=like.dtype, device=like.device)
    groups = x.size(0) // B
    heads.view(B, T, groups, -1, size).copy_(x.view(B, groups, T, -1, size).transpose(1, 2))
    return heads.transpose(1, 2)
