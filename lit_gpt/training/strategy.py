"""Runs one rank's model behind its strategy (one device, DDP, FSDP2, DeepSpeed), and its optimizer."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lit_gpt.distributed import deepspeed
from lit_gpt.distributed.fabric import DeepSpeedStrategy, Fabric
from lit_gpt.distributed.whole import gather, shard_like
from lit_gpt.methods.method import Method
from lit_gpt.model.gpt import GPT
from lit_gpt.training import optimizers
from lit_gpt.training.args import OptimizationArgs
from lit_gpt.training.objectives import Objective
from lit_gpt.training.optimizers import InBackward, groups, make_optimizer, optimizer_for, trained

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine  # which takes seconds to import


@dataclass
class LossScale:
    """Keeps gradients within the range of fp16: the loss is multiplied by a factor, which gradients are divided by.

    The factor adapts, so that it is as large as may be (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2).

    Attributes:
        steps: how many were taken since the factor has changed.
    """

    factor: float = 2.0**16
    steps: int = 0

    GROWTH_INTERVAL: ClassVar[int] = 2000  # steps

    def update(self, finite: bool) -> bool:
        """Adapt the factor to whether all gradients are finite, and return whether they may be used.

        They may if the loss was not scaled up at all: the next loss will say what is wrong.
        """
        self.steps += 1
        if not finite and self.factor > 1:
            self.factor, self.steps = self.factor / 2, 0
            return False
        if self.steps == self.GROWTH_INTERVAL:
            self.factor, self.steps = self.factor * 2, 0
        return True


class Worker:
    """Runs forward, backward and optimizer steps of one rank.

    Attributes:
        model: the GPT itself; `wrapped` is the same behind Fabric's strategy.
        engine: DeepSpeed's, if that is the strategy.
        parameters: those that train.
        loss_scale: that of fp16.
    """

    def __init__(
        self, fabric: Fabric, model: GPT, method: Method, objective: Objective, args: OptimizationArgs, precision: str
    ) -> None:
        self.fabric, self.model, self.method, self.objective = fabric, model, method, objective
        self.precision, self.max_grad_norm = precision, args.max_grad_norm
        self.loss_scale = LossScale() if precision == "fp16" else None
        self.engine: DeepSpeedEngine | None = None
        if isinstance(fabric.strategy, DeepSpeedStrategy):  # which wants both together
            self.wrapped, self.optimizer = fabric.setup(model, make_optimizer(trained(model), args))
            self.engine = fabric.strategy.model
            deepspeed.gather_with(model, trained(model.lm_head))
        else:
            self.wrapped = fabric.setup_module(model)
            optimizer = optimizer_for(groups(model, method, args), args)
            self.optimizer = optimizer if isinstance(optimizer, InBackward) else fabric.setup_optimizers(optimizer)
        self.parameters = trained(model)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass."""
        return self.method.autocast(self.precision, self.fabric.device.type)

    def backward(self, row: Any, weight: float, more: bool) -> Tensor:
        """Add a row's share to the gradients, and return its share of the loss, a float32 scalar on the device.

        Args:
            weight: the global batch's, by which the summed loss is divided.
            more: whether other rows follow before the optimizer steps, so that ranks need not meet yet.
        """
        with self.maybe_no_sync(more):
            with self.autocast():
                loss = self.objective.loss(self.wrapped, row) / weight
            # ranks' gradients are averaged, and their sum is wanted
            self.fabric.backward(loss * self.fabric.world_size * (self.loss_scale.factor if self.loss_scale else 1.0))
        return loss.detach()

    def maybe_no_sync(self, more: bool) -> AbstractContextManager[Any]:
        """Return the context of a backward pass, in which ranks exchange gradients only if no more rows follow."""
        if self.engine:
            self.engine.set_gradient_accumulation_boundary(not more)
            return nullcontext()
        return self.fabric.no_backward_sync(self.wrapped, enabled=more)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the step to come, before its backward passes: an optimizer may step in these."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_ratio", 1.0)

    def overflowed(self) -> bool:
        """Divide fp16's loss scale out of the gradients; if some have overflowed, drop them all and lower the scale.

        Return whether they were dropped: the backward passes are then to be taken again. All ranks decide alike.
        """
        if self.loss_scale is None:
            return False
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        for gradient in gradients:
            gradient.div_(self.loss_scale.factor)
        finite = bool(gather(nn.utils.get_total_norm(gradients)).isfinite())
        if dropped := not self.loss_scale.update(finite):
            self.optimizer.zero_grad()
            scale = self.loss_scale.factor
            self.fabric.print(f"gradients overflowed in fp16; the step is taken again at a loss scale of {scale:g}")
        return dropped

    def step(self) -> Tensor | None:
        """Take the optimizer's step, with gradients clipped if asked for.

        Returns:
            the norm of the gradient of all that trains, before it was clipped, over all ranks: a float32 scalar on the
            device; None where no rank ever holds all gradients.
        """
        if self.engine:  # clips by itself, see lit_gpt.distributed.deepspeed.config
            self.engine.step()
            return deepspeed.gradient_norm(self.engine, self.fabric.device)
        norm = self.clip_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def clip_gradients(self) -> Tensor | None:
        """Clip the gradients if asked for, and return the norm of all before that; see `step`."""
        if isinstance(self.optimizer, InBackward):
            return None
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = gather(nn.utils.get_total_norm(gradients, foreach=True))
        if self.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        return norm

    def dry_run_step(self, row: Any) -> None:
        """Take a step on a row that changes nothing, so that what runs out of memory does so now."""
        if not self.engine:  # which has made the optimizer's state already
            optimizers.allocate(self.optimizer)
        self.set_learning_rate(0.0)  # or weights would decay
        self.wrapped.train()
        with self.maybe_no_sync(more=False):
            with self.autocast():
                loss = self.objective.loss(self.wrapped, row)
            self.fabric.backward(loss * 0.0)
        self.step()
        (deepspeed.clear_optimizer_state if self.engine else optimizers.clear_state)(self.optimizer)

    def optimizer_state(self) -> dict[str, Any]:
        """Return the optimizer's state, whole, whatever the number of ranks. All ranks must ask together."""
        if self.engine:
            return deepspeed.optimizer_state(self.parameters, self.optimizer)
        state = tree_map(lambda leaf: gather(leaf) if isinstance(leaf, Tensor) else leaf, self.optimizer.state_dict())
        return state | ({"loss_scale": asdict(self.loss_scale)} if self.loss_scale else {})

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Continue from a state that `optimizer_state` has returned."""
        if self.engine:
            return deepspeed.load_optimizer_state(self.parameters, self.optimizer, state)
        if self.loss_scale:
            self.loss_scale = LossScale(**state["loss_scale"])
        state = {name: part for name, part in state.items() if name != "loss_scale"}
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for i, entries in state["state"].items():
            for name, entry in entries.items():
                if isinstance(entry, Tensor) and entry.shape == parameters[i].shape:
                    entries[name] = shard_like(parameters[i], entry)
        return self.optimizer.load_state_dict(state)
