"""Causal attention with soft caps and with sinks, of which flash attention knows neither, by torch's flex_attention.

It serves training on CUDA: it computes scores block by block as flash attention does, for all samples of a row at once
(Dong et al. 2024, Flex Attention, arXiv 2412.05496).
"""

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from lit_gpt.kernels.attention import ScoreParams

BLOCK = 128  # queries, and keys, of a block of the mask


def interval_mask(first: Tensor) -> BlockMask:
    """Return the mask by which each query sees the keys from its first one up to its own.

    What torch's create_block_mask finds in the (T, T) scores is worked out from the intervals here, since these scores
    would take 256 MiB of a row of 16,384 tokens. Nothing waits for the device.

    Args:
        first: int (T,), not decreasing; each at most the query's own place.
    """
    T, blocks = len(first), -(-len(first) // BLOCK)
    # queries that a last block lacks see nothing, so that no block of keys is whole for it
    firsts = F.pad(first, (0, blocks * BLOCK - T), value=T).view(blocks, BLOCK)
    keys = torch.arange(blocks, device=first.device)
    own, seen, whole = keys[:, None], firsts[:, :1] // BLOCK, (firsts[:, -1:] + BLOCK - 1) // BLOCK
    partial = (keys == own) | (keys >= seen) & (keys < whole.minimum(own))
    full = (keys >= whole) & (keys < own)

    def seen_by(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first[query]) & (key <= query)

    lists = (*_block_lists(partial), *_block_lists(full))
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=seen_by, seq_lengths=(T, T))


def _block_lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return of each block of queries how many blocks of keys are chosen, and these first among all, as BlockMask has
    them: int32 (1, 1, blocks) and (1, 1, blocks, blocks); chosen: bool (blocks, blocks)."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


def attention(
    q: Tensor, k: Tensor, v: Tensor, scores: ScoreParams, mask: BlockMask, sinks: Tensor | None = None
) -> Tensor:
    """Compute attention to what a mask lets see: on CUDA by kernels that torch.compile makes on first use, elsewhere by
    flex_attention's plain formula, which holds all scores.

    No GPU has run it yet. What is unproven there: that the kernels compile for every head size that flash attention
    takes, how long that takes, and what they gain. The formula, with its gradients, is held against attention.py's.

    Args:
        q: (B, n_head, T, head_size). k, v: (B, n_query_groups, T, head_size).
        scores: scale and soft cap; the window is the mask's.
        mask: as `interval_mask` makes it.
        sinks: (n_head,), the score of one more key of each head, which all queries see and which has no value.

    Returns:
        (B, n_head, T, head_size), in q's dtype.
    """
    attend = _compiled() if q.is_cuda else cast(Callable[..., Any], flex_attention)
    arguments: dict[str, Any] = {"score_mod": _soft_cap(scores.softcap), "block_mask": mask, "scale": scores.scale}
    arguments["enable_gqa"] = q.size(1) != k.size(1)
    # Another model's scale or cap would become a variable of the compiled code, which flex_attention does not take.
    with torch._dynamo.config.patch(specialize_float=True, recompile_limit=64):
        if sinks is None:
            return attend(q, k, v, **arguments)
        y, of_keys = attend(q, k, v, **arguments, return_aux=AuxRequest(lse=True))
    return with_sinks(y, of_keys.lse, sinks)


def with_sinks(y: Tensor, log_sums: Tensor, sinks: Tensor) -> Tensor:
    """Return attention with a sink for each head, which adds to the sum of exponentials that a query divides by.

    Args:
        y: (B, n_head, T, head_size), attention without sinks.
        log_sums: float32 (B, n_head, T), the logarithm of that sum.
        sinks: (n_head,), see `attention`.
    """
    return (y * torch.sigmoid(log_sums - sinks[:, None]).unsqueeze(-1)).to(y.dtype)


@cache
def _soft_cap(cap: float | None) -> Callable[..., Tensor] | None:
    """Return what flex_attention applies to a score; see ScoreParams."""
    if cap is None:
        return None

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, fullgraph=True)  # or all scores would be held, unsaid
