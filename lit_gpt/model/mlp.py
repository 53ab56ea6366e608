"""The feed-forward part of a block: plain, gated, or routed over experts."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lit_gpt.errors import UserError
from lit_gpt.kernels import fused
from lit_gpt.kernels.fused import ACTIVATIONS, Activation
from lit_gpt.model.config import Config
from lit_gpt.model.linear import Linear
from lit_gpt.model.moe import Experts, Router

Apply = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]  # applies a function whose output is cheap to recompute


def plainly(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


def activation(config: Config) -> Activation:
    if config.activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UserError(f"config.json: the activation '{config.activation}' is not supported; expected one of {known}")
    return ACTIVATIONS[config.activation]


class GptNeoxMLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc = Linear(config.n_embd, config.intermediate_size, bias=config.bias)
        self.proj = Linear(config.intermediate_size, config.n_embd, bias=config.bias)
        self.activation = activation(config)

    def forward(self, x: Tensor, apply: Apply = plainly) -> Tensor:
        return self.proj(apply(self.activation, self.fc(x)))


class SwiGLU(nn.Module):
    """A gated MLP (Shazeer 2020, GLU Variants Improve Transformer): gate and up in one product, the gate first."""

    def __init__(self, config: Config, size: int | None = None) -> None:
        super().__init__()
        inner = size or config.intermediate_size
        self.gate_up = Linear(config.n_embd, 2 * inner, bias=config.bias)
        self.proj = Linear(inner, config.n_embd, bias=config.bias)
        self.activation = activation(config)

    def forward(self, x: Tensor, apply: Apply = plainly) -> Tensor:
        return self.proj(apply(self.inner, self.gate_up(x)))

    def inner(self, gate_up: Tensor) -> Tensor:
        return fused.gated(gate_up, self.activation)


class MoE(nn.Module):
    """Many SwiGLUs, the experts; each token goes through a few of them (Jiang et al. 2024, Mixtral of Experts).

    All go through one more, if it has a shared expert, whose output a sigmoid of the token gates (Qwen Team 2024).

    Training has no loss besides that of the tokens. transformers' one that balances the experts' load is off as well,
    unless `output_router_logits` asks for it.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        n, inner = config.n_expert, config.intermediate_size
        self.router = Router(config.n_embd, n, config.n_expert_per_token, config.norm_expert_weights)
        self.gate_up = Experts(n, config.n_embd, 2 * inner)
        self.proj = Experts(n, inner, config.n_embd)
        self.activation = activation(config)
        shared = config.shared_expert_size
        self.shared = SwiGLU(config, shared) if shared else None
        self.shared_gate = Linear(config.n_embd, 1, bias=False) if shared else None

    def forward(self, x: Tensor, apply: Apply = plainly) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, routes = self.router(tokens)
        gate_up = self.gate_up(routes.dispatch(tokens), routes)
        y = self.proj(apply(self.inner, gate_up), routes)
        routed = routes.combine(y, weights).view_as(x)
        if self.shared is None or self.shared_gate is None:
            return routed
        return routed + torch.sigmoid(self.shared_gate(x)) * self.shared(x, apply)

    def inner(self, gate_up: Tensor) -> Tensor:
        return fused.gated(gate_up, self.activation)


MLPS = {"GptNeoxMLP": GptNeoxMLP, "SwiGLU": SwiGLU, "MoE": MoE}
