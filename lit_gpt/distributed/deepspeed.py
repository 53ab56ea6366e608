"""Sets up DeepSpeed's ZeRO (Rajbhandari et al. 2020), gathers what it shares out, and shares it out again.

Stage 2 shares out gradients and optimizer state among the ranks, stage 3 the weights too.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def config(stage: int, offload: bool, max_grad_norm: float | None = None) -> dict[str, Any]:
    """Return DeepSpeed's settings (its page "DeepSpeed Configuration JSON" explains each).

    No precision is set: weights keep the dtypes that the methods give them, so that what trains stays float32.

    Args:
        stage: 2 or 3.
        offload: keep in host memory what is shared out, and take the optimizer's steps there.
        max_grad_norm: clip the gradient of all that trains to this norm; None: never.
    """
    place = {"device": "cpu", "pin_memory": True} if offload else {"device": "none"}
    zero = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True, "offload_optimizer": place}
    if stage == 3:
        zero["offload_param"] = place
    return {
        "train_micro_batch_size_per_gpu": 1,  # one packed row; after how many the optimizer steps is said each time
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # any of --optimizer
        "zero_force_ds_cpu_optimizer": False,  # PyTorch's own; DeepSpeed's for the CPU wants a compiler
    }


def is_partitioned(tensor: Tensor) -> bool:
    """Return whether a parameter is shared out by stage 3, or its float32 original by stage 2."""
    return hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping")


def gather_with(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Let stage 3 hold these parameters whole while `module` runs forward or backward, not only while their own does.

    Needed where a gradient is taken within the forward pass, as the loss takes the head's.
    """
    from deepspeed.runtime.zero import register_external_parameter

    for parameter in parameters:
        register_external_parameter(module, parameter)


def get_full(parameter: Tensor) -> Tensor:
    """Return the float32 original of a parameter. All ranks must ask together."""
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


def set_full(parameter: nn.Parameter, contents: Tensor) -> None:
    """Share out new contents of a parameter and of its float32 original. All ranks must do so together."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param

    contents = contents.to(parameter.device)
    with torch.no_grad(), GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(contents)
    safe_set_full_fp32_param(parameter, contents)


def optimizer_state(parameters: list[nn.Parameter], optimizer: Any) -> dict[str, Any]:
    """Return the whole state of an optimizer of these parameters, as its `state_dict` on one device would."""
    from deepspeed.utils import safe_get_full_optimizer_state

    inner = unwrap(optimizer)
    entries: dict[str, Any] = next(iter(inner.state.values()), {})  # none of plain SGD under stage 3
    names = [name for name, entry in entries.items() if isinstance(entry, Tensor) and entry.ndim]
    plain = {name: entry for name, entry in entries.items() if name not in names}
    state = {
        i: {name: safe_get_full_optimizer_state(parameter, name) for name in names} | plain
        for i, parameter in enumerate(parameters)
    }
    group = {name: value for name, value in inner.param_groups[0].items() if name != "params"}
    return {"state": state, "param_groups": [group | {"params": list(range(len(parameters)))}]}


def load_optimizer_state(parameters: list[nn.Parameter], optimizer: Any, state: dict[str, Any]) -> None:
    """Share out a state that `optimizer_state` has returned, whatever the number of ranks then."""
    from deepspeed.utils import safe_set_full_optimizer_state

    for i, entries in state["state"].items():
        for name, entry in entries.items():
            if isinstance(entry, Tensor) and entry.ndim:
                safe_set_full_optimizer_state(parameters[i], entry.to(parameters[i].device), name)
    entries = state["state"].get(0, {})
    plain = {name: entry for name, entry in entries.items() if not (isinstance(entry, Tensor) and entry.ndim)}
    for entries in unwrap(optimizer).state.values():
        entries.update(plain)


def clear_optimizer_state(optimizer: Any) -> None:
    """Set the optimizer's state to zero, and keep it allocated."""
    for entries in unwrap(optimizer).state.values():
        for entry in entries.values():
            if isinstance(entry, Tensor):
                entry.zero_()


def unwrap(optimizer: Any) -> torch.optim.Optimizer:
    """Return PyTorch's optimizer, which is within DeepSpeed's, within Fabric's."""
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def gradient_norm(engine: Any, device: torch.device) -> Tensor | None:
    """Return the norm of the last step's gradient, a float32 scalar on `device`; None if DeepSpeed took none."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else torch.as_tensor(norm, dtype=torch.float32, device=device)
