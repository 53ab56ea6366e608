"""Inputs of each layer's own: small vectors of a token, beside its embedding (Gemma Team 2025, Gemma 3n)."""

import torch
from torch import Tensor, nn

from lit_gpt.kernels.functional import Activation
from lit_gpt.model.config import Config
from lit_gpt.model.linear import Linear
from lit_gpt.model.norms import norm


class LayerInputs(nn.Module):
    """Makes the inputs of all layers: the mean of an embedding and of a normed projection of the model's embedding.

    Both are scaled, so that the mean has the length of each.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layers, self.size, self.n_embd = config.n_layer, config.layer_input_size, config.n_embd
        self.vocabulary = config.layer_vocab_size or config.padded_vocab_size
        self.wte = nn.Embedding(self.vocabulary, self.layers * self.size)
        self.proj = Linear(self.n_embd, self.layers * self.size, bias=False)
        self.norm = norm(config, self.size)

    def forward(self, idx: Tensor, x: Tensor) -> Tensor:
        """Return what each layer is given, (B, T, n_layer, layer_input_size).

        Args:
            idx: int64 (B, T); ids beyond those with inputs of their own, and those of learned vectors, are taken for
                the first, as transformers takes images.
            x: the embeddings (B, T, n_embd).
        """
        scale = torch.tensor(self.size**0.5, dtype=x.dtype)  # rounded as the weights are
        embedded = self.wte(idx.masked_fill(idx >= self.vocabulary, 0)) * scale
        projected = (self.proj(x) * self.n_embd**-0.5).unflatten(-1, (self.layers, self.size))
        normed = self.norm(projected).to(x.dtype)  # under autocast norms give float32
        return (normed + embedded.unflatten(-1, (self.layers, self.size))) * 2**-0.5


class LayerInput(nn.Module):
    """Makes of a layer's own input, gated by the stream, what is added to the stream."""

    def __init__(self, config: Config, activation: Activation) -> None:
        super().__init__()
        self.gate = Linear(config.n_embd, config.layer_input_size, bias=False)
        self.activation = activation
        self.proj = Linear(config.layer_input_size, config.n_embd, bias=False)
        self.norm = norm(config)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        """Return, like the stream x (B, T, n_embd), what it makes of `given` (B, T, layer_input_size)."""
        return self.norm(self.proj(self.activation(self.gate(x)) * given))
