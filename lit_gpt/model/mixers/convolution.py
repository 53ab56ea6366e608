"""The short causal convolution before or in place of a recurrence: each channel sees its last few tokens."""

import torch
from torch import Tensor, nn


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
        padded, last, T = torch.cat((tail.to(x.dtype), x), dim=1), self.size - 1, x.size(1)
        weights = self.weight.to(x.dtype).squeeze(1).t()
        y = x * weights[last]
        if self.bias is not None:
            y = y + self.bias.to(x.dtype)
        for back in range(1, self.size):
            earlier = padded[:, last - back : last - back + T]
            if positions is not None:
                earlier = earlier * (positions >= back).to(x.dtype).unsqueeze(1)
            y = torch.addcmul(y, earlier, weights[last - back])
        return y, padded[:, T:]
