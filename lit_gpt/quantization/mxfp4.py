"""MXFP4 (Open Compute Project 2023, Microscaling Formats), in which the experts of gpt-oss are published.

A block of 32 numbers shares a power of two; each number is one of 16 values.
"""

import torch
from torch import Tensor

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # and with the highest bit, the negatives


def dequantize(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the numbers of MXFP4 blocks, exactly.

    Args:
        blocks: uint8 (..., blocks of a row, 16), two numbers in each, the first in the lower half.
        scales: uint8 (..., blocks of a row), the power of two plus 127.

    Returns:
        bfloat16 (..., 32 * blocks of a row).

    Raises:
        ValueError: the shapes are of different blocks, or not of such.
    """
    if blocks.shape != (*scales.shape, 16):
        raise ValueError("the scales are of other blocks")
    values = torch.tensor((*VALUES, *(-value for value in VALUES)), dtype=torch.bfloat16)
    halves = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)  # (..., blocks of a row, 32)
    powers = scales.int() - 127
    return torch.ldexp(values[halves.int()].float(), powers.unsqueeze(-1)).bfloat16().flatten(-2)
