"""Makes optimizers by name, with their arguments checked; takes steps within the backward pass; GaLore."""

import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lit_gpt.errors import UsageError
from lit_gpt.methods.method import Method
from lit_gpt.training.args import OptimizationArgs
from lit_gpt.training.checks import locate_optimizer

EIGHT_BIT = {"adamw8bit", "paged_adamw8bit"}
DEFAULTS: dict[str, dict[str, Any]] = {"adamw": {"fused": True}}


# What trains, or groups of it, each with what differs from the other arguments.
Parameters = list[nn.Parameter] | list[dict[str, Any]]


def make_optimizer(parameters: Parameters, args: OptimizationArgs) -> torch.optim.Optimizer:
    """Return the optimizer `--optimizer` with `--optimizer_args`, `--learning_rate` and `--weight_decay`.

    Raises:
        UsageError: no such optimizer, or an argument that it does not take; none is ever dropped.
    """
    optimizer = find_class(args.optimizer)
    given = {"lr": args.learning_rate, **DEFAULTS.get(args.optimizer, {}), **args.optimizer_args}
    takes = inspect.signature(optimizer).parameters
    if "weight_decay" in takes:
        given = {"weight_decay": args.weight_decay} | given
    elif args.weight_decay:
        raise UsageError(f"--optimizer {args.optimizer}: takes no weight decay; pass --weight_decay 0")
    for name in given:
        if name not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            known = ", ".join(list(takes)[1:])
            raise UsageError(f"--optimizer_args: {args.optimizer} takes no '{name}'; it takes {known}")
    if {"lr", "weight_decay"} & args.optimizer_args.keys():
        raise UsageError("--optimizer_args: lr and weight_decay have flags of their own")
    try:
        return optimizer(parameters, **given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"--optimizer {args.optimizer} {args.optimizer_args}: {error}") from None


def groups(model: nn.Module, method: Method, args: OptimizationArgs) -> Parameters:
    """Return the parameters that train, in groups by the ratio of their learning rates if these differ.

    An optimizer may tell more of them apart: its `group_of` gives what holds for a parameter of a name.
    """
    parts: dict[tuple[tuple[str, Any], ...], list[nn.Parameter]] = {}
    own: Callable[[str, Tensor], dict[str, Any]]
    own = getattr(find_class(args.optimizer), "group_of", lambda name, parameter: {})
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ratio = method.learning_rate_ratio(name)
            settings = {"lr": ratio * args.learning_rate, "lr_ratio": ratio} | own(name, parameter)
            parts.setdefault(tuple(settings.items()), []).append(parameter)
    if all(dict(settings).keys() == {"lr", "lr_ratio"} and dict(settings)["lr_ratio"] == 1.0 for settings in parts):
        return trained(model)
    return [dict(settings) | {"params": part} for settings, part in parts.items()]


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that train."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def optimizer_for(parameters: Parameters, args: OptimizationArgs) -> "torch.optim.Optimizer | InBackward":
    """Return the optimizer of a run, or with `--optimizer_in_backward` one for each parameter."""
    return InBackward(parameters, args) if args.optimizer_in_backward else make_optimizer(parameters, args)


def parts(optimizer: Any) -> list[torch.optim.Optimizer]:
    """Return the optimizers of an InBackward, else the optimizer alone."""
    return optimizer.optimizers if isinstance(optimizer, InBackward) else [optimizer]


def allocate(optimizer: Any) -> None:
    """Let the optimizer make its state, by a step that changes no weight."""
    for part in parts(optimizer):
        for group in part.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        part.step()
        part.zero_grad()


def clear_state(optimizer: Any) -> None:
    """Remove the optimizer's state."""
    for part in parts(optimizer):
        part.state.clear()


def find_class(name: str) -> type[torch.optim.Optimizer]:
    """Return the class that `--optimizer` names."""
    module, cls = locate_optimizer(name)
    try:
        found: Any = getattr(importlib.import_module(module), cls)
    except ImportError as error:
        raise UsageError(f"--optimizer {name}: {module} cannot be imported ({error})") from None
    except AttributeError:
        raise UsageError(f"--optimizer {name}: {module} has no {cls}") from None
    if not isinstance(found, type):
        raise UsageError(f"--optimizer {name}: is no class; expected the full name of one, such as torch.optim.SGD")
    return found


class InBackward:
    """Takes each parameter's step as soon as its gradient is whole, and drops the gradient (Lv et al. 2023, LOMO).

    Gradients never exist all at once, so a step must be one backward pass. Stands in for the optimizer in the loop.
    """

    def __init__(self, parameters: Parameters, args: OptimizationArgs) -> None:
        groups = [part if isinstance(part, dict) else {"params": [part]} for part in parameters]
        each = [(parameter, group | {"params": [parameter]}) for group in groups for parameter in group["params"]]
        self.optimizers = [make_optimizer([group], args) for _, group in each]
        for (parameter, _), optimizer in zip(each, self.optimizers, strict=True):
            parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: self.take(optimizer))

    @staticmethod
    def take(optimizer: torch.optim.Optimizer) -> None:
        """Take the step of one parameter."""
        optimizer.step()
        optimizer.zero_grad()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:
        return {parameter: state for optimizer in self.optimizers for parameter, state in optimizer.state.items()}

    def step(self) -> None:
        """Taken already."""

    def zero_grad(self) -> None:
        """Done already."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as one optimizer of all parameters has it, so that a run may be resumed with the other."""
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        groups: list[dict[str, Any]] = []
        for i, own in enumerate(state["param_groups"][0] for state in states):
            if not groups or own | {"params": None} != groups[-1] | {"params": None}:
                groups.append(own | {"params": []})
            groups[-1]["params"].append(i)
        return {"state": {i: s["state"][0] for i, s in enumerate(states) if s["state"]}, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        groups = {i: group | {"params": [0]} for group in state["param_groups"] for i in group["params"]}
        for i, optimizer in enumerate(self.optimizers):
            mine = {0: state["state"][i]} if i in state["state"] else {}
            optimizer.load_state_dict({"state": mine, "param_groups": [groups[i]]})


class GaLore(torch.optim.Optimizer):
    """AdamW whose state is of low rank, though all of a weight trains (Zhao et al. 2024, GaLore, arXiv 2403.03507).

    Of the gradient G (m, n) of a matrix of the blocks that has more than `rank` rows and columns, the moments are kept
    in a subspace: that of its largest singular vectors at every `gap`-th step (algorithm 2),

        R = P^T G,  W <- W - lr (scale P Adam(R) + weight_decay W),  P (m, rank); or R = G P, P (n, rank), if m > n

    The moments stay what they are when the subspace changes, as in the published program.

    Args:
        rank: of the subspace.
        gap: steps after which it is chosen anew.
        scale: multiplies an update that comes out of it.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        rank: int = 128,
        gap: int = 200,
        scale: float = 0.25,
    ) -> None:
        for name, value in {"rank": rank, "gap": gap}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a whole number above 0")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"rank": rank, "gap": gap, "scale": scale, "projects": True})

    @staticmethod
    def group_of(name: str, parameter: Tensor) -> dict[str, Any]:
        """Return what holds for a parameter of the model: embeddings and head are not projected, nor are vectors."""
        return {"projects": name.startswith("h.") and parameter.ndim > 1}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure is ever given
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad, group)

    def update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Take the step of one parameter (..., m, n), in place."""
        state, (beta_1, beta_2) = self.state[parameter], group["betas"]
        projects = group["projects"] and min(parameter.shape[-2:]) > group["rank"]
        step = int(state.get("step", 0))
        if projects and step % group["gap"] == 0:
            state["subspace"] = subspace(gradient, group["rank"])
        reduced = project(gradient, state["subspace"]) if projects else gradient
        if not step:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(reduced), torch.zeros_like(reduced)
        state["step"] = torch.tensor(float(step + 1))
        state["exp_avg"].lerp_(reduced, 1 - beta_1)
        state["exp_avg_sq"].mul_(beta_2).addcmul_(reduced, reduced, value=1 - beta_2)
        root = (state["exp_avg_sq"] / (1 - beta_2 ** (step + 1))).sqrt_().add_(group["eps"])
        change = (state["exp_avg"] / (1 - beta_1 ** (step + 1))).div_(root)
        if projects:
            change = project_back(change, state["subspace"], parameter.shape).mul_(group["scale"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(change, alpha=-group["lr"])


def subspace(gradient: Tensor, rank: int) -> Tensor:
    """Return the largest singular vectors (..., min(m, n), rank) of a gradient (..., m, n), on its shorter side."""
    U, _, Vh = torch.linalg.svd(gradient.float() if gradient.dtype != torch.float64 else gradient, full_matrices=False)
    vectors = Vh.mT if gradient.size(-2) > gradient.size(-1) else U
    return vectors[..., :rank].to(gradient.dtype).contiguous()


def project(gradient: Tensor, P: Tensor) -> Tensor:
    """Return a gradient (..., m, n) in the subspace: (..., rank, n), or (..., m, rank) if m > n."""
    return gradient @ P if gradient.size(-2) > gradient.size(-1) else P.mT @ gradient


def project_back(reduced: Tensor, P: Tensor, shape: Iterable[int]) -> Tensor:
    """Return what `project` has reduced in the shape (..., m, n)."""
    *_, m, n = shape
    return reduced @ P.mT if m > n else P @ reduced
