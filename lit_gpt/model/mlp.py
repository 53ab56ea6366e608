"""The feed-forward part of a block: plain, gated, or routed over experts."""

from collections.abc import Callable
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.errors import UserError
from lit_gpt.kernels import functional
from lit_gpt.kernels.functional import ACTIVATIONS, Activation
from lit_gpt.model.config import Config
from lit_gpt.model.linear import Linear
from lit_gpt.model.moe import Experts, Router, Routing, SharedGate
from lit_gpt.model.norms import norm

Apply = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]  # applies a function whose output is cheap to recompute


def plainly(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


def activation(config: Config) -> Activation:
    if config.activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UserError(f"config.json: the activation '{config.activation}' is not supported; expected one of {known}")
    return ACTIVATIONS[config.activation]


class GptNeoxMLP(nn.Module):
    def __init__(self, config: Config, size: int) -> None:
        super().__init__()
        self.fc = Linear(config.n_embd, size, bias=config.bias)
        self.proj = Linear(size, config.n_embd, bias=config.bias)
        self.activation = activation(config)

    def forward(self, x: Tensor, apply: Apply = plainly) -> Tensor:
        return self.proj(apply(self.activation, self.fc(x)))


class XIELU(nn.Module):
    """xIELU (Huang & Schlag 2024, arXiv 2411.13010): a parabola on the right, on the left the integral of an ELU, each
    with a factor that trains: softplus(alpha_p), and beta + softplus(alpha_n).

    Both meet at 0, with the slope beta; what is nearer to 0 than eps counts as eps in the exponential.
    """

    beta: Tensor
    eps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.beta: Tensor
        self.eps: Tensor
        self.alpha_p, self.alpha_n = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.register_buffer("beta", torch.tensor(0.5))
        self.register_buffer("eps", torch.tensor(-1e-6))

    def forward(self, x: Tensor) -> Tensor:
        beta, right, left = self.beta, F.softplus(self.alpha_p), self.beta + F.softplus(self.alpha_n)
        sides = right * x * x, left * (torch.expm1(torch.minimum(x, self.eps.to(x.dtype))) - x)
        return (torch.where(x > 0, *sides) + beta * x).to(x.dtype)


class XIELUMLP(nn.Module):
    """A plain MLP with xIELU."""

    def __init__(self, config: Config, size: int) -> None:
        super().__init__()
        self.fc = Linear(config.n_embd, size, bias=config.bias)
        self.xielu = XIELU()
        self.proj = Linear(size, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, apply: Apply = plainly) -> Tensor:
        return self.proj(apply(self.xielu, self.fc(x)))


class SwiGLU(nn.Module):
    """A gated MLP (Shazeer 2020, GLU Variants Improve Transformer): gate and up in one product, the gate first."""

    def __init__(self, config: Config, size: int) -> None:
        super().__init__()
        self.gate_up = Linear(config.n_embd, 2 * size, bias=config.bias)
        self.proj = Linear(size, config.n_embd, bias=config.bias)
        self.activation = activation(config)

    def forward(self, x: Tensor, apply: Apply = plainly) -> Tensor:
        return self.proj(apply(self.inner, self.gate_up(x)))

    def inner(self, gate_up: Tensor) -> Tensor:
        return functional.gated(gate_up, self.activation)


class ScaledSwiGLU(SwiGLU):
    """A SwiGLU with fixed factors on its gate and on its output (Zuo et al. 2025, Falcon-H1)."""

    def __init__(self, config: Config, size: int) -> None:
        super().__init__(config, size)
        self.gate_scale, self.output_scale = config.mlp_scales

    def forward(self, x: Tensor, apply: Apply = plainly) -> Tensor:
        return super().forward(x, apply) * self.output_scale

    def inner(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.activation(gate * self.gate_scale) * up


class SparseSwiGLU(SwiGLU):
    """A SwiGLU of whose gates only the largest are above 0, about so many as in a normal distribution.

    Source: Gemma Team 2025, Gemma 3n; the estimate of the k-th largest is that of Zhang et al. 2025, Spark Transformer
    (arXiv 2506.06644).
    """

    def __init__(self, config: Config, size: int) -> None:
        super().__init__(config, size)
        self.deviations = NormalDist().inv_cdf(config.sparsity)

    def inner(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        std, mean = torch.std_mean(gate, dim=-1, correction=0, keepdim=True)
        return self.activation(F.relu(gate - (mean + self.deviations * std))) * up


class MoE(nn.Module):
    """Many MLPs, the experts; each token goes through a few of them (Jiang et al. 2024, Mixtral of Experts).

    All go through one more, if it has a shared expert, whose output a sigmoid of the token gates (Qwen Team 2024).

    Training has no loss besides that of the tokens. transformers' one that balances the experts' load is off as well,
    unless `output_router_logits` asks for it.
    """

    def __init__(self, config: Config, size: int) -> None:
        super().__init__()
        n, shared = config.n_expert, config.shared_intermediate_size
        self.router = Router(config)
        # by the name that goes with what it makes
        self.first, outputs = ("gate_up", 2 * size) if config.expert_gate else ("fc", size)
        self.add_module(self.first, Experts(n, config.n_embd, outputs, config.expert_bias))
        self.proj = Experts(n, size, config.n_embd, config.expert_bias)
        self.shared = (SwiGLU if config.expert_gate else GptNeoxMLP)(config, shared) if shared else None
        self.shared_gate = SharedGate(config.n_embd) if config.shared_expert_gate else None
        self.activation, self.limit, self.slope = activation(config), config.gate_limit, config.gate_slope
        self.weighs_inputs = config.weigh_expert_inputs

    def forward(self, x: Tensor, apply: Apply = plainly) -> Tensor:
        y = self.routed(x, self.router(x.flatten(0, 1)), apply)
        if self.shared is None:
            return y
        shared = self.shared(x, apply)
        return y + (shared if self.shared_gate is None else self.shared_gate(x) * shared)

    def routed(self, x: Tensor, chosen: tuple[Tensor, Routing], apply: Apply) -> Tensor:
        """Return what the experts that a router has chosen make of x (B, T, n_embd)."""
        weights, routes = chosen
        rows = routes.dispatch(x.flatten(0, 1))
        if self.weighs_inputs:
            rows = rows * weights.flatten()[routes.order].unsqueeze(1).to(rows.dtype)
            weights = torch.ones_like(weights)
        made = self.get_submodule(self.first)(rows, routes)
        return routes.combine(self.proj(apply(self.inner, made), routes), weights).view_as(x)

    def inner(self, made: Tensor) -> Tensor:
        if self.first == "fc":
            return self.activation(made)
        if self.limit is not None:
            return clamped_gate(made, self.limit, self.slope)
        return functional.gated(made, self.activation)


def clamped_gate(gate_up: Tensor, limit: float, slope: float) -> Tensor:
    """Return gate * sigmoid(slope * gate) * (up + 1), with both clamped to the limit, the gate only from above.

    Source: OpenAI 2025, gpt-oss-120b & gpt-oss-20b Model Card.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(slope * gate) * (up + 1)


class NormedMoE(MoE):
    """Experts, and beside them one that all tokens go to, each between norms of its own (Gemma Team 2026, Gemma 4).

    It reads the stream itself, of which its router too makes a norm of its own.
    """

    reads_stream = True

    def __init__(self, config: Config, size: int) -> None:
        super().__init__(config, size)
        self.norm, self.post_norm = norm(config), norm(config)
        self.shared_norm, self.shared_post_norm = norm(config), norm(config)

    def forward(self, x: Tensor, apply: Apply = plainly) -> Tensor:
        assert self.shared is not None
        routed = self.routed(apply(self.norm, x), self.router(x.flatten(0, 1)), apply)
        return self.post_norm(routed) + self.shared_post_norm(self.shared(apply(self.shared_norm, x), apply))


MLPS: dict[str, Callable[[Config, int], nn.Module]] = {
    "GptNeoxMLP": GptNeoxMLP,
    "XIELUMLP": XIELUMLP,
    "SwiGLU": SwiGLU,
    "ScaledSwiGLU": ScaledSwiGLU,
    "SparseSwiGLU": SparseSwiGLU,
    "MoE": MoE,
    "NormedMoE": NormedMoE,
}


def make_mlp(name: str, config: Config, size: int) -> nn.Module:
    """Return a new MLP of a class of MLPS. Raises UserError: there is none of that name."""
    if name not in MLPS:
        raise UserError(f"{config.name}: mlp_class is {name!r}, expected one of {', '.join(MLPS)}")
    return MLPS[name](config, size)
