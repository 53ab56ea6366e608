"""Bottleneck adapters: small MLPs with a residual, between the layers of the base.

both      y + s U f(D y + c) + s e after attention and after the MLP, before the residual sum (Houlsby et al. 2019,
          arXiv 1902.00751)
mlp       the same after the MLP alone (Pfeiffer et al. 2021, arXiv 2005.00247); with a norm before it, that of Lin et
          al. 2020, arXiv 2004.03829
parallel  y + s U f(D x + c) + s e, of what the MLP is given (He et al. 2022, arXiv 2110.04366)

U and e are zero at first, so that a freshly attached model gives exactly the base's logits. AdapterDrop (Ruecklé et al.
2021, arXiv 2010.11918) leaves the first layers out: always, or a random number of them in training, so that they can be
left out later.
"""

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.errors import UsageError
from lit_gpt.kernels.functional import ACTIVATIONS
from lit_gpt.methods.decoding_tape import DecodingTape
from lit_gpt.methods.hyperparameters import BottleneckConfig
from lit_gpt.methods.method import Method, mark_trainable
from lit_gpt.model.gpt import GPT, Block
from lit_gpt.model.mlp import Apply, plainly


class Bottlenecks(Method):
    """Trains bottlenecks after attention and MLP, or beside the MLP."""

    name = "bottleneck"
    config: BottleneckConfig

    @property
    def first_trained_layer(self) -> int:
        return self.config.start_layer

    @property
    def first_uniform_layer(self) -> int:
        return max(self.config.start_layer, self.config.drop)

    @property
    def unsharded(self) -> str | None:
        return f"--bottleneck_drop {self.config.drop}" if self.config.drop else None

    def attach(self, model: GPT) -> GPT:
        return attach(model, self.config)


class Dropped:
    """Says how many of the first layers are left out of the row that the model computes: int64 ()."""

    layers: Tensor


class Bottleneck(nn.Module):
    """Holds D (size, n_embd), c (size,), U (n_embd, size) and e (n_embd,) in float32, and what norms their input.

    Args:
        layer: the block's number.
        first: whether it is the first of those that can be left out, which draws how many are.
    """

    def __init__(
        self, n_embd: int, config: BottleneckConfig, layer: int, dropped: Dropped, first: bool, device: torch.device
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": torch.float32}
        self.scale, self.activation = config.scale, ACTIVATIONS[config.activation]
        self.layer, self.dropped, self.first = layer, dropped, first
        self.most_dropped = config.drop
        self.down, self.down_bias = (
            nn.Parameter(torch.zeros(s, **place)) for s in ((config.size, n_embd), config.size)
        )
        self.up, self.up_bias = (nn.Parameter(torch.zeros(s, **place)) for s in ((n_embd, config.size), n_embd))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.norm = nn.LayerNorm(n_embd, **place) if config.norm else nn.Identity()
        self.trained_parameters = tuple(name for name, _ in self.named_parameters())

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added for x (..., n_embd), in its shape and dtype."""
        normed = self.norm(x.float()).to(x.dtype)
        inner = self.activation(F.linear(normed, self.down.to(x.dtype), self.down_bias.to(x.dtype)))
        y = F.linear(inner, self.up.to(x.dtype), self.up_bias.to(x.dtype)) * self.scale
        if self.training and self.layer < self.most_dropped:
            if self.first:
                self.dropped.layers = torch.randint(self.most_dropped + 1, (), device=x.device)
            y = y * (self.dropped.layers <= self.layer)
        return y

    def record_down(self, tape: DecodingTape, x: Tensor) -> Tensor:
        """Add to a decoding tape what becomes of x up to the activation, and return the buffer that holds it."""
        if isinstance(self.norm, nn.LayerNorm):
            x = tape.norm(self.norm, x, "bottleneck")
        low = tape.lora_down(self.down.to(tape.dtype), x)
        tape.scale(low, torch.ones_like(self.down_bias), self.down_bias.detach())
        tape.activate(low, self.activation.name)
        return low

    def record_up(self, tape: DecodingTape, low: Tensor, y: Tensor) -> None:
        """Add to a decoding tape that what comes out of the bottleneck is added to y."""
        up = (self.up.detach() * self.scale).to(tape.dtype).t().contiguous()
        tape.lora_up(y, low, 0, up, (0, y.size(1)))
        tape.scale(y, torch.ones_like(self.up_bias), self.up_bias.detach() * self.scale)


class Behind(nn.Module):
    """Takes the place of what comes before a residual sum, a norm or nothing, and has a bottleneck behind it."""

    def __init__(self, norm: nn.Module, bottleneck: Bottleneck) -> None:
        super().__init__()
        self.norm, self.bottleneck = norm, bottleneck

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return y + self.bottleneck(y)

    def record(self, tape: DecodingTape, x: Tensor, name: str | None, parts: int) -> Tensor:
        """Add both to a decoding tape."""
        y = tape.norm(self.norm, x, name, parts)
        self.bottleneck.record_up(tape, self.bottleneck.record_down(tape, y), y)
        return y


class Beside(nn.Module):
    """Takes the place of an MLP, and has a bottleneck beside it."""

    def __init__(self, mlp: nn.Module, bottleneck: Bottleneck) -> None:
        super().__init__()
        self.mlp, self.bottleneck = mlp, bottleneck

    def forward(self, x: Tensor, apply: Apply = plainly) -> Tensor:
        return self.mlp(x, apply) + self.bottleneck(x)

    def record(self, tape: DecodingTape, x: Tensor) -> Tensor:
        """Add both to a decoding tape."""
        low = self.bottleneck.record_down(tape, x)
        y = tape.mlp(self.mlp, x)
        self.bottleneck.record_up(tape, low, y)
        return y


def attach(model: GPT, config: BottleneckConfig) -> GPT:
    """Give the layers from `start_layer` on their bottlenecks, in place, and let only these train.

    Raises:
        UsageError: no layer would have one.
    """
    layers, start, dropped, added = model.config.n_layer, config.start_layer, Dropped(), 0
    if start >= layers or config.drop > layers:
        name, value = ("start_layer", start) if start >= layers else ("drop", config.drop)
        raise UsageError(f"--bottleneck_{name} {value}: the model has only {layers} layers")

    def new(block: Block, layer: int) -> Bottleneck:
        nonlocal added
        device, added = next(block.parameters()).device, added + 1
        return Bottleneck(model.config.n_embd, config, layer, dropped, added == 1, device)

    for layer, block in list(enumerate(cast(Iterable[Block], model.h)))[start:]:
        if config.place == "both":
            block.post_norm_1 = Behind(block.post_norm_1, new(block, layer))
        if block.mlp is not None and config.place == "parallel":
            block.mlp = Beside(block.mlp, new(block, layer))
        elif block.mlp is not None:
            block.post_norm_2 = Behind(block.post_norm_2, new(block, layer))
    if not added:
        raise UsageError(f"--bottleneck_place {config.place}: no layer has an MLP of its own; expected both")
    mark_trainable(model)
    return model
