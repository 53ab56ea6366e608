"""Noise on the embeddings in training."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def with_noise(x: Tensor, lengths: Sequence[int], alpha: float) -> Tensor:
    """Return x plus U(-1, 1) * alpha / sqrt(L d) (Jain et al. 2023, NEFTune, arXiv 2310.05914).

    L is the length of the sample, as in the paper, not that of the row that it is packed into.

    Args:
        x: embeddings (B, T, d).
        lengths: of the samples in the row; their sum is T.
    """
    bounds = [alpha / math.sqrt(length * x.size(-1)) for length in lengths for _ in range(length)]
    noise = torch.empty_like(x).uniform_(-1, 1)
    return x + noise * torch.tensor(bounds, dtype=x.dtype, device=x.device).unsqueeze(-1)
