"""Block-scaled FP8 (DeepSeek-AI 2024, DeepSeek-V3, section 3.3), in which DeepSeek, Qwen and others publish weights.

A number is stored in 8 bits (float8_e4m3fn), and a block of rows and columns, often 128 x 128, shares a factor.
"""

from torch import Tensor


def dequantize(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the numbers, computed in float32.

    Args:
        codes: float8 (..., rows, columns).
        scales: float32 (..., blocks of rows, blocks of columns), or one number for all.
        block: rows and columns of a block; the last blocks may be cut off.

    Returns:
        bfloat16 (..., rows, columns).

    Raises:
        ValueError: the scales are of other blocks.
    """
    if scales.numel() > 1:
        rows, columns = codes.shape[-2:]
        if scales.shape != (*codes.shape[:-2], -(-rows // block[0]), -(-columns // block[1])):
            raise ValueError("the scales are of other blocks")
        scales = scales.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]
    return (codes.float() * scales.float()).bfloat16()
