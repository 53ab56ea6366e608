"""Makes optimizers by name, with their arguments checked, and takes steps within the backward pass."""

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lit_gpt.errors import UsageError
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
            if not groups or own.get("lr_ratio") != groups[-1].get("lr_ratio"):
                groups.append(own | {"params": []})
            groups[-1]["params"].append(i)
        return {"state": {i: s["state"][0] for i, s in enumerate(states) if s["state"]}, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        groups = {i: group | {"params": [0]} for group in state["param_groups"] for i in group["params"]}
        for i, optimizer in enumerate(self.optimizers):
            mine = {0: state["state"][i]} if i in state["state"] else {}
            optimizer.load_state_dict({"state": mine, "param_groups": [groups[i]]})
