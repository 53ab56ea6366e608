"""The cross-entropy of rows of logits, whose gradient takes the place of the logits."""

import torch
from torch import Tensor

from lit_gpt.kernels.cuda.language import jit, power_of_2, tl
from lit_gpt.kernels.cuda.launch import launch

BLOCK = 4096


@jit
def cross_entropy_kernel(logits, labels, losses, size, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    at, label = logits + row.to(tl.int64) * size, tl.load(labels + row)
    truth = tl.load(at + label).to(tl.float32)
    highest, total = -float("inf"), 0.0
    for start in range(0, size, BLOCK):  # the maximum, and the sum relative to it (Milakov & Gimelshein 2018)
        column = start + tl.arange(0, BLOCK)
        value = tl.load(at + column, column < size, -float("inf")).to(tl.float32)
        above = tl.maximum(highest, tl.max(value, 0))
        total = total * tl.exp(highest - above) + tl.sum(tl.exp(value - above), 0)
        highest = above
    tl.store(losses + row, highest - truth + tl.log(total))
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(at + column, column < size, -float("inf")).to(tl.float32)
        slope = tl.exp(value - highest) / total - tl.where(column == label, 1.0, 0.0)
        tl.store(at + column, slope.to(logits.dtype.element_ty), column < size)


def cross_entropy_(logits: Tensor, labels: Tensor) -> Tensor:
    """Put the gradient of the summed cross-entropy in the place of logits (n, vocabulary), contiguous.

    Args:
        labels: int64 (n,).

    Returns:
        The cross-entropy of each row in nats, float32 (n,).
    """
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    block = min(BLOCK, power_of_2(logits.size(1)))
    launch(cross_entropy_kernel, (len(logits),), logits, labels, losses, logits.size(1), warps=8, BLOCK=block)
    return losses
