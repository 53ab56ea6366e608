"""Attention of queries to keys and values: in rows, in rows of packed samples, of one more token; by whichever kernel
serves best."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.kernels import attention, flex
from lit_gpt.kernels.attention import ScoreParams
from lit_gpt.kernels.cuda import launch
from lit_gpt.kernels.policy import policy
from lit_gpt.model.packed_inputs import Segments


def attend_within(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: ScoreParams,
    segments: Segments | None,
    positions: Tensor | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute attention within the samples of a packed row, of one query of each row to the places up to its position,
    or in rows that each are one sequence; see `attend_packed`, `decode_attention`, `attend`."""
    if segments is not None:
        chunk = scores.chunk
        return attend_packed(q, k, v, scores, segments.in_groups(chunk, chunk) if chunk else segments, sinks)
    if positions is not None:
        return decode_attention(q, k, v, scores, positions, sinks)
    return attend_in_chunks(q, k, v, scores, sinks) if scores.chunk else attend(q, k, v, scores, sinks)


def attend_in_chunks(q: Tensor, k: Tensor, v: Tensor, scores: ScoreParams, sinks: Tensor | None = None) -> Tensor:
    """Compute attention within chunks of `scores.chunk` positions; the arguments are those of `attend`."""
    S, size = k.size(2), scores.chunk or k.size(2)
    begin, pieces = S - q.size(2), []
    for start in range(begin // size * size, S, size):
        stop = min(start + size, S)
        queries = q[:, :, max(start - begin, 0) : stop - begin]
        pieces.append(attend(queries, k[:, :, start:stop], v[:, :, start:stop], scores, sinks))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def attend(q: Tensor, k: Tensor, v: Tensor, scores: ScoreParams, sinks: Tensor | None = None) -> Tensor:
    """Compute causal attention of queries that are the last T of S positions.

    Args:
        q: (B, n_head, T, head_size). k, v: (B, n_query_groups, S, head_size).
        sinks: (n_head,), the score of one more key of each head, which has no value (OpenAI 2025, gpt-oss).
    """
    T, S, window = q.size(2), k.size(2), scores.window
    if T > 1 and sinks is None and attention.reads_prompts(q, k, v, scores):
        return attention.attention(q, k, v, scores, (S,))
    if T == S and (sinks is not None or use_blockwise(q, scores)):
        return attention.attention(q, k, v, scores, (T,), sinks)
    if T == 1:
        first = 0 if window is None else max(0, S - window)
        return sdpa_one_query(q, k[:, :, first:], v[:, :, first:], scores, sinks=sinks)
    if T == S and (window is None or S <= window):
        gqa = q.size(1) != k.size(1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scores.scale, enable_gqa=gqa)
    behind = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(S, device=q.device)
    return sdpa(q, k, v, scores, behind >= 0 if window is None else (behind >= 0) & (behind < window), sinks)


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, scores: ScoreParams, seen: Tensor | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Compute attention of queries (B, n_head, T, head_size) to the keys that they see.

    Args:
        seen: bool (T, S) or (B, 1, T, S); None: all.
    """
    if scores.softcap is not None or sinks is not None:
        return sdpa_by_matmul(q, k, v, scores, seen, sinks)
    gqa = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scores.scale, enable_gqa=gqa)


def sdpa_one_query(
    q: Tensor, k: Tensor, v: Tensor, scores: ScoreParams, seen: Tensor | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Compute attention of one query of each row; the arguments are those of `sdpa`, with T = 1."""
    if q.device.type != "cpu":
        if seen is not None and q.size(1) != k.size(1):  # for which torch's would repeat the keys, in float32
            return sdpa_by_matmul(q, k, v, scores, seen, sinks)
        return sdpa(q, k, v, scores, seen, sinks)
    # torch's own kernel takes many times as long there, and so do products in narrow types
    wide = torch.promote_types(q.dtype, torch.float32)
    return sdpa_by_matmul(q.to(wide), k.to(wide), v.to(wide), scores, seen, sinks).to(q.dtype)


def sdpa_by_matmul(
    q: Tensor, k: Tensor, v: Tensor, scores: ScoreParams, seen: Tensor | None, sinks: Tensor | None = None
) -> Tensor:
    """Compute attention by two matrix products, soft caps included; the arguments are those of `sdpa`."""
    grouped = q.unflatten(1, (k.size(1), -1))  # (B, n_query_groups, heads of a group, T, head_size)
    logits = (grouped.flatten(2, 3) @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scores.scale
    if scores.softcap is not None:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    logits = logits.unflatten(2, grouped.shape[2:4])
    if seen is not None:
        logits = logits.masked_fill(~(seen if seen.ndim == 2 else seen.unsqueeze(1)), -torch.inf)
    if sinks is not None:
        one_more = sinks.to(logits.dtype).view(1, k.size(1), -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat((logits, one_more), dim=-1)
    return (logits.softmax(-1)[..., : k.size(2)].to(v.dtype).flatten(2, 3) @ v).view_as(q)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, scores: ScoreParams, positions: Tensor, sinks: Tensor | None = None
) -> Tensor:
    """Compute attention of one query of each row to the places up to its position.

    Args:
        q: (B, n_head, 1, head_size). k, v: (B, n_query_groups, S, head_size).
        positions: int64 (B,).
    """
    behind = positions[:, None] - torch.arange(k.size(2), device=k.device)  # (B, S)
    reach = scores.window if scores.chunk is None else positions[:, None] % scores.chunk + 1
    seen = behind >= 0 if reach is None else (behind >= 0) & (behind < reach)
    if sinks is not None or not torch.compiler.is_compiling():
        return sdpa_one_query(q, k, v, scores, seen[:, None, None], sinks)
    # written for the compiler to make one loop of it
    grouped = q.unflatten(1, (k.size(1), -1)).float()  # (B, n_query_groups, heads of a group, 1, head_size)
    logits = (grouped * k.unsqueeze(2).float()).sum(-1) * scores.scale  # (B, n_query_groups, heads of a group, S)
    if scores.softcap is not None:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    weights = logits.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    return (weights.unsqueeze(-1) * v.unsqueeze(2).float()).sum(-2).to(q.dtype).view_as(q)


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, scores: ScoreParams, segments: Segments, sinks: Tensor | None = None
) -> Tensor:
    """Compute causal attention within each sample of a packed row. The shapes are those of `attend`, B = 1, S = T."""
    if flash_supports(q):
        if scores.softcap is None and sinks is None:
            return attend_varlen(q, k, v, scores, segments)
        if launch.serves(q) and torch.is_grad_enabled():  # the rest is too short for its compiling to pay
            return attend_flex(q, k, v, scores, segments, sinks)
    if sinks is not None or use_blockwise(q, scores) or attention.reads_prompts(q, k, v, scores):
        return attention.attention(q, k, v, scores, segments.lengths, sinks)
    lengths = segments.lengths
    parts = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True)
    return torch.cat([attend(*part, scores) for part in parts], dim=2)


def attend_in_groups(
    q: Tensor, k: Tensor, v: Tensor, scores: ScoreParams, segments: Segments, size: int, sinks: Tensor | None = None
) -> Tensor:
    """Compute shifted sparse attention within each sample (Chen et al. 2023, LongLoRA, arXiv 2309.12307, section 3.2).

    The first half of the heads attends within groups of `size` tokens. The groups of the other half lie half a group
    further on, so that they overlap two of those. Unlike in the paper's program, whose groups wrap around the end of a
    sample, none sees what comes later. Heads that share keys and values stay together, unless all do.

    Args:
        size: of a group, at least 2. The other arguments are those of `attend_packed`.
    """
    heads, groups = q.size(1), k.size(1)
    half = -(-groups // 2)
    keys = (half, groups - half) if groups > 1 else None
    queries = [n * (heads // groups) for n in keys] if keys else [-(-heads // 2), heads // 2]
    ks, vs = (x.split(keys, 1) if keys else (x, x) for x in (k, v))
    own = (None, None) if sinks is None else sinks.split(queries)
    halves = zip(q.split(queries, 1), ks, vs, own, (size, size // 2), strict=True)
    parts = [
        attend_packed(q, k, v, scores, segments.in_groups(size, first), sinks)
        for q, k, v, sinks, first in halves
        if q.size(1)
    ]
    return torch.cat(parts, dim=1)


def use_blockwise(q: Tensor, scores: ScoreParams) -> bool:
    """Return whether to attend by whole matrix products.

    torch's own kernel knows no soft cap, and its backward pass is slow on a CPU.
    """
    return scores.softcap is not None or (q.device.type == "cpu" and q.requires_grad and torch.is_grad_enabled())


def flash_supports(q: Tensor) -> bool:
    """Return whether flash attention computes in this dtype, head size and on this device."""
    if policy().simulate_cuda:
        return not policy().contents and q.size(-1) <= 256
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or q.size(-1) % 8 or q.size(-1) > 256:
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, scores: ScoreParams, segments: Segments) -> Tensor:
    """Compute `attend_packed` by flash attention for samples of varying length."""
    from torch.nn.attention.varlen import varlen_attn

    # flash attention reads views, of which each head's elements lie side by side, and keys that heads share
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))  # (T, heads, head_size)
    heads = q.size(1)
    grouped: dict[str, Any] = {}
    if heads != k.size(1) and takes_grouped_keys(varlen_attn):
        grouped["enable_gqa"] = True
    elif heads != k.size(1):
        k, v = (x.repeat_interleave(heads // x.size(1), dim=1) for x in (k, v))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    ends, longest = segments.offsets, max(segments.lengths)
    span = -1 if scores.window is None else scores.window - 1, 0
    y = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scores.scale, window_size=span, **grouped)
    assert isinstance(y, Tensor)  # a pair only where the sums of exponentials are asked for
    return y.transpose(0, 1).unsqueeze(0)


def attend_flex(
    q: Tensor, k: Tensor, v: Tensor, scores: ScoreParams, segments: Segments, sinks: Tensor | None
) -> Tensor:
    """Compute `attend_packed` by flex_attention; tensors without contents take what memory it would."""
    if policy().contents:
        return flex.attention(q, k, v, scores, segments.causal_mask(scores.window), sinks)
    y = attend_varlen(q, k, v, scores, segments)  # which keeps the same for its gradients
    return y if sinks is None else flex.with_sinks(y, y.new_empty(y.shape[:-1], dtype=torch.float32), sinks)


@cache
def takes_grouped_keys(varlen_attn: Callable[..., Any]) -> bool:
    """Return whether this release's varlen_attn takes fewer heads of keys than of queries; torch 2.11's does not."""
    return "enable_gqa" in inspect.signature(varlen_attn).parameters
