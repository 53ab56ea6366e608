"""Trace one training step on fake tensors, with the choices that are made on a CUDA device, and count its kernels."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_gpt.families.registry import config_from_name
from lit_gpt.hardware import on_meta
from lit_gpt.kernels.cuda.launch import Launch, recorded
from lit_gpt.kernels.policy import use_policy
from lit_gpt.methods.registry import config_class, make_method
from lit_gpt.model.gpt import GPT, quantize
from lit_gpt.model.packed_inputs import Segments, Targets
from lit_gpt.training.memory.plan import materialize

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "is_nonzero")
TIMES = {  # that a kernel reads or writes an argument, where it is not once
    ("lora_up_kernel", "y"): 2, ("rotate_kernel", "qkv"): 2, ("cross_entropy_kernel", "logits"): 3,
}  # fmt: skip


@dataclass
class Trace:
    """Holds what a step does beside matrix products: how often each kernel runs, and the bytes that it moves."""

    kernels: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    products: int = 0

    def note(self, name: str, size: int) -> None:
        self.kernels[name] += 1
        self.bytes[name] += size

    def __sub__(self, other: "Trace") -> "Trace":
        kernels, sizes = Counter(self.kernels), Counter(self.bytes)
        kernels.subtract(other.kernels)
        sizes.subtract(other.bytes)
        return Trace(+kernels, +sizes, self.products - other.products)


class Counting(TorchDispatchMode):
    """Counts operations that run a kernel: not views, and not what only takes memory.

    Raises:
        AssertionError: an operation lets the host wait for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        assert name not in WAITS, f"{name} waits for the device"
        given, made = tensors((args, kwargs)), tensors(result)
        if name in PRODUCTS:
            self.trace.products += 1
        elif runs_a_kernel(func, given, made) and max((x.numel() for x in given + made), default=0) > 1:
            self.trace.note(name, sum(map(moved, given)) + sum(map(moved, made)))
        return result


def tensors(nested: Any) -> list[Tensor]:
    return [x for x in tree_leaves(nested) if isinstance(x, Tensor)]


def runs_a_kernel(func: Any, given: list[Tensor], made: list[Tensor]) -> bool:
    if func._schema.is_mutable:
        return True
    if func.is_view or not made or "empty" in func._schema.name or func._schema.name in ("aten::lift_fresh",):
        return False
    storages = {x.untyped_storage()._cdata for x in given}
    return any(x.untyped_storage()._cdata not in storages for x in made)


def moved(x: Tensor) -> int:
    """Return the bytes of a tensor, of which an expanded one has fewer than elements."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def note_launches(launches: Iterable[Launch], trace: Trace) -> None:
    for launch in launches:
        name, given = launch.kernel.__name__, launch.named.items()
        trace.note(name, sum(moved(x) * TIMES.get((name, key), 1) for key, x in given if isinstance(x, Tensor)))


def trace_step(
    name: str, method: str, layers: int, tokens: int = 4096, format: str | None = None, length: int = 128, **policy: Any
) -> tuple[Trace, list[Launch]]:
    """Return what forward and backward pass of a row do with a published model that has so many layers."""
    config = replace(config_from_name(name), n_layer=layers)
    settings = config_class(method)()
    settings = replace(settings, start_layer=0) if hasattr(settings, "start_layer") else settings
    attached = make_method(method, settings)
    with on_meta():
        base = GPT(config).to(torch.bfloat16)
        model = attached.attach(quantize(base, format) if format else base).train()
    with FakeTensorMode(), use_policy(simulate_cuda=True, contents=False, cpp=False, **policy):
        materialize(model)
        places = torch.arange(0, tokens, 2)
        idx, labels = torch.zeros(1, tokens, dtype=torch.int64), torch.zeros(len(places), dtype=torch.int64)
        segments = Segments.of([length] * (tokens // length))
        with Counting() as counting, recorded() as launches, attached.autocast("bf16", "cpu"):
            model(idx, segments=segments, targets=Targets(places, labels)).backward()
        note_launches(launches, counting.trace)
    return counting.trace, launches


def per_layer(name: str, method: str, tokens: int = 4096, **options: Any) -> Trace:
    """Return what one more layer adds to a step, by the token."""
    two, one = (trace_step(name, method, layers, tokens, **options)[0] for layers in (3, 2))
    difference = two - one
    difference.bytes = Counter({kernel: size // tokens for kernel, size in difference.bytes.items()})
    return difference
