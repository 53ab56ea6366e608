"""The short causal convolution before or in place of a recurrence: each channel sees its last few tokens."""

import torch
from torch import Tensor, nn

from lit_gpt.kernels.convolution import causal_convolution


class CausalConvolution(nn.Module):
    """Convolves each channel with a filter of its own over `size` tokens, itself the last."""

    def __init__(self, channels: int, size: int, bias: bool) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.empty(channels, 1, size).uniform_(-(size**-0.5), size**-0.5))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor, tail: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Convolve x (B, T, channels).

        Args:
            tail: the size - 1 tokens before it, zeros where there are none, (B, size - 1, channels).
            positions: int64 (T,), of tokens in their packed samples, of which none sees another's; None: x is one.

        Returns:
            The result, like x, and the tail of what follows.
        """
        tail, last = tail.to(x.dtype), self.size - 1
        y = causal_convolution(x, tail, self.weight, self.bias, positions)
        kept = torch.cat((tail, x[:, -last:]), dim=1)
        return y, kept[:, kept.size(1) - last :]
