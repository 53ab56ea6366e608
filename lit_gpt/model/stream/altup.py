"""Several residual streams, of which a layer computes one: AltUp and LAuReL, as Gemma 3n has them.

AltUp (Baykal et al. 2023, Alternating Updates for Efficient Transformers, arXiv 2301.13310): before a layer the
streams are predicted, each as a sum of all; the layer computes the first of them; after it all are corrected by what
that came to beside its prediction. LAuReL (Menghani et al. 2024, Learned Augmented Residual Layer, arXiv 2411.07501): a
product of low rank beside attention.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.model.config import Config
from lit_gpt.model.linear import Linear
from lit_gpt.model.norms import norm


class Streams(nn.Module):
    """Makes the streams of the embedding, and one hidden state of the streams; all have the length of the first."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        n, others = config.n_embd, config.n_stream - 1
        self.into = nn.ModuleList(Linear(n, n, bias=False) for _ in range(others))
        self.out = nn.ModuleList(Linear(n, n, bias=False) for _ in range(others))

    def split(self, x: Tensor) -> Tensor:
        """Return the streams (n_stream, B, T, n_embd) that begin with the embedding x (B, T, n_embd)."""
        return torch.stack([x, *(as_long(x, layer(x)) for layer in self.into)])

    def join(self, streams: Tensor) -> Tensor:
        """Return the mean of the streams, (B, T, n_embd)."""
        first, *others = streams
        projected = [as_long(first, layer(x)) for layer, x in zip(self.out, others, strict=True)]
        return torch.stack([first, *projected]).mean(0)


def as_long(x: Tensor, y: Tensor) -> Tensor:
    """Return y with the length of x, both (..., size)."""
    own, wanted = (z.square().mean(-1, keepdim=True) for z in (y, x))
    return y * wanted.sqrt() / own.clamp(min=1e-5).sqrt()


class AltUp(nn.Module):
    """Predicts a layer's streams, and corrects them. No nn.Linear, so that no method attaches to it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        n, size = config.n_stream, config.n_embd
        self.norm = norm(config)
        self.router = nn.Parameter(torch.randn(n, size) * size**-0.5)
        self.prediction = nn.Parameter(torch.zeros(n * n, n))
        self.correction = nn.Parameter(torch.zeros(n, n))
        self.output_scale = nn.Parameter(torch.ones(size))

    def routes(self, x: Tensor) -> Tensor:
        """Return how much a stream (B, T, n_embd) is like each, (B, T, n_stream), from -1 to 1."""
        return torch.tanh(F.linear(self.norm(x) / x.size(-1), self.router).float()).to(x.dtype)

    def predict(self, streams: Tensor) -> Tensor:
        """Return the streams (n_stream, B, T, n_embd) as they are predicted before the layer."""
        n = len(streams)
        weights = F.linear(self.routes(streams[0]), self.prediction).unflatten(-1, (n, n))
        return streams + torch.einsum("btij,jbtn->ibtn", weights, streams)

    def correct(self, predicted: Tensor, x: Tensor) -> Tensor:
        """Return the streams (n_stream, B, T, n_embd) after the layer, which gave x (B, T, n_embd)."""
        weights = F.linear(self.routes(x), self.correction) + 1
        return predicted + (x - predicted[0]) * weights.movedim(-1, 0).unsqueeze(-1)


class Laurel(nn.Module):
    """Gives x and a normed product of low rank of it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.down = Linear(config.n_embd, config.laurel_rank, bias=False)
        self.up = Linear(config.laurel_rank, config.n_embd, bias=False)
        self.norm = norm(config)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.up(self.down(x)))
