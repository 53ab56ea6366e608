"""LLaMA-Adapter V2 (Gao et al. 2023, arXiv 2304.15010): Adapter, and besides it a bias and a scale on the output of
every linear layer, the head included, and trainable norms.

y = scale * (W x + bias), with scale 1 and bias 0 at first, so that a freshly attached model gives exactly the base's
logits.
"""

import torch
from torch import Tensor, nn

from lit_gpt.kernels import functional
from lit_gpt.methods import adapter
from lit_gpt.methods.decoding_tape import DecodingTape
from lit_gpt.methods.hyperparameters import AdapterConfig
from lit_gpt.methods.method import LinearWrapper, Method, mark_trainable
from lit_gpt.methods.parts import TrainedNorm
from lit_gpt.model.gpt import GPT
from lit_gpt.model.moe import Experts, Routing, scaled_by_expert
from lit_gpt.model.norms import RMSNorm
from lit_gpt.quantization.modules import QuantizedLinear


class AdapterV2(Method):
    """Trains Adapter's prompts, the norms, and a bias and a scale of every linear layer."""

    name = "adapter_v2"
    config: AdapterConfig

    @property
    def first_uniform_layer(self) -> int:
        return self.config.start_layer

    def attach(self, model: GPT) -> GPT:
        return attach(model, self.config)


class ScaledLayer(LinearWrapper):
    """Holds a scale and a bias for each output of a layer in float32: (out_features,), or (n_expert, out_features)."""

    trained_parameters = ("scale", "shift")

    def __init__(self, linear: nn.Module) -> None:
        super().__init__(linear)
        shape, device = (*self.experts, self.out_features), next(linear.parameters()).device
        self.scale = nn.Parameter(torch.ones(shape, device=device, dtype=torch.float32))
        self.shift = nn.Parameter(torch.zeros(shape, device=device, dtype=torch.float32))


class ScaledLinear(ScaledLayer):
    """A linear layer, or what wraps one, whose output is scaled and shifted."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.scaled(self.linear(x), self.scale, self.shift)

    def record(self, tape: DecodingTape, x: Tensor, name: str) -> Tensor:
        """Add the layer to a decoding tape."""
        y = tape.linear(self.linear, x, name)
        tape.scale(y, self.scale, self.shift)
        return y


class ScaledExperts(ScaledLayer):
    """A layer of experts, each of whose outputs is scaled and shifted."""

    def forward(self, x: Tensor, routes: Routing) -> Tensor:
        return scaled_by_expert(self.linear(x, routes), self.scale, self.shift, routes.groups)


def attach(model: GPT, config: AdapterConfig) -> GPT:
    """Attach Adapter, wrap every linear layer and every norm, in place, and let only what is attached train."""
    adapter.add_prompts(model, config)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.LayerNorm | RMSNorm):
            model.set_submodule(name, TrainedNorm(module, {"weight", "bias"}))
        elif isinstance(module, nn.Linear | QuantizedLinear):
            model.set_submodule(name, ScaledLinear(module))
        elif isinstance(module, Experts):
            model.set_submodule(name, ScaledExperts(module))
    mark_trainable(model)
    return model
