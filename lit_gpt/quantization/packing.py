"""Small operations that the formats share: groups of a row, two codes in a byte, numbers rounded to bfloat16."""

import torch
from torch import Tensor

GROUP = 64  # weights of a row that share their parameters, in the formats of 4 bits


def split_groups(weight: Tensor) -> Tensor:
    """Return a weight (rows, columns) as (rows, groups, GROUP).

    The last group is filled up with the row's last weight, which changes no range.
    """
    missing = -weight.size(1) % GROUP
    return torch.cat((weight, weight[:, -1:].expand(-1, missing)), 1).unflatten(-1, (-1, GROUP))


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack uint8 codes (rows, columns) of 4 bits as bytes (rows, columns / 2), the first of two in the upper half."""
    return codes[:, ::2] << 4 | codes[:, 1::2]


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Undo `pack_nibbles`."""
    return torch.stack((packed >> 4, packed & 15), -1).flatten(-2)


def nibble_table(values: Tensor) -> Tensor:
    """Return the values of the two codes in each possible byte, (256, 2), from those of the 16 codes."""
    return torch.cartesian_prod(values, values)


def round_up_to_bf16(x: Tensor) -> Tensor:
    """Return the next bfloat16 numbers from positive float32 ones upwards, as float32."""
    return (x.contiguous().view(torch.int32) + 0xFFFF & -0x10000).view(torch.float32)


def nonzero(scale: Tensor) -> Tensor:
    """Return scales that may be divided by: zeros become the smallest normal number."""
    return scale.clamp(min=torch.finfo(scale.dtype).tiny)
