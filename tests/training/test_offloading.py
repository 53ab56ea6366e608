"""Tensors in host memory, by a stand-in for a stream that makes copies when they are waited for, not before."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.steps import random_row, step
from helpers.tiny_models import model_of
from lit_gpt.methods import lora
from lit_gpt.training.memory.activation_checkpointing import Offloading, apply_activation_checkpointing
from lit_gpt.training.memory.offloading import Offloader


class LateCopies:
    """Makes copies as late as a stream may, in the order in which they were asked for; targets hold NaN until then."""

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, weakref.ref[Tensor]]] = []
        self.made = 0
        self.log: list[str] = []

    def copy(self, target: Tensor, source: Tensor) -> int:
        target.fill_(torch.nan)
        to_host = target._base is not None  # a view of memory that is used again
        self.log.append(f"{'out' if to_host else 'back'} {len(self.asked)}")
        # what the device holds must live until somebody waits; memory of the host is kept by whom it is for
        self.asked.append((target, weakref.ref(source) if to_host else lambda: source))
        return len(self.asked)

    def wait(self, copy: int) -> None:
        self.log.append(f"wait {copy - 1}")
        for target, source in self.asked[self.made : copy]:
            assert (there := source()) is not None, "freed while it is copied"
            target.copy_(there)
        self.made = max(self.made, copy)


def offloaded(copies: Any, scale: Tensor, x: Tensor, layers: int = 4) -> Tensor:
    """Run layers that each keep their input, whose gradient reads it, with inputs offloaded."""
    offloader = Offloader(copies)
    for _ in range(layers):
        with torch.autograd.graph.saved_tensors_hooks(offloader.pack, offloader.unpack):
            x = x * x  # saves x twice
        x = x + scale
    return x


def test_a_step_whose_copies_are_late_has_the_same_gradients(tmp_path):
    torch.manual_seed(0)
    gpt, row = (
        lora.attach(model_of("llama", "llama3", tmp_path), lora.LoRAConfig(r=4, dropout=0.1, mlp=True)),
        random_row(),
    )
    for layer in lora.lora_layers(gpt).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    plain, copies = step(gpt, row), LateCopies()
    offloader = Offloader(copies)
    for block in gpt.h:
        block.execution = Offloading(offloader)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(plain, step(gpt, row), strict=True))
    assert copies.made and len(offloader.free) == gpt.config.n_layer  # the second step took the first one's memory


def test_the_next_tensor_comes_back_before_it_is_needed():
    """A tensor leaves during one layer; the last stays; each comes back while the one after it is worked on."""
    copies = LateCopies()
    offloader = Offloader(copies)
    kept = [offloader.pack(torch.full((3,), float(i))) for i in range(4)]
    assert copies.log == ["out 0", "wait 0", "out 1", "wait 1", "out 2", "wait 2", "out 3"]
    copies.log.clear()
    for i in reversed(range(4)):
        assert torch.equal(offloader.unpack(kept[i]), torch.full((3,), float(i)))
    assert copies.log == ["back 4", "wait 3", "back 5", "wait 4", "back 6", "wait 5", "wait 6"]
    assert torch.equal(offloader.unpack(kept[2]), torch.full((3,), 2.0))  # once more, from the host


def test_the_device_holds_one_tensor_more_than_are_in_use():
    offloader = Offloader()
    kept = [offloader.pack(torch.ones(3)) for _ in range(4)]
    assert [offloaded.x is None for offloaded in kept] == [True, True, True, False]
    x = offloader.unpack(kept.pop())
    assert [offloaded.x is None for offloaded in kept] == [True, True, False] and x.sum() == 3


def test_memory_is_free_once_nobody_may_read_it_and_grows():
    copies = LateCopies()
    offloader = Offloader(copies)
    kept = [offloader.pack(torch.ones(n)) for n in (3, 5)]
    places = {offloaded.memory.data_ptr() for offloaded in kept}
    kept.clear()  # a pass that failed
    assert copies.made == 2 and copies.log[-1].startswith("wait")  # nothing is under way
    again = offloader.pack(torch.ones(2))
    assert again.memory.data_ptr() in places and again.on_host().shape == (2,)
    assert offloader.pack(torch.ones(2, 50)).memory.numel() == 400


@pytest.mark.parametrize("layers", [1, 4])
def test_what_autograd_saves_comes_back_as_it_was(layers):
    x, scale = torch.randn(7, requires_grad=True), torch.randn(7)
    (actual,) = torch.autograd.grad(offloaded(LateCopies(), scale, x, layers).sum(), x)
    y = x
    for _ in range(layers):
        y = y * y + scale
    (expected,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(actual, expected)


def test_blocks_share_one_offloader(tmp_path):
    gpt = model_of("llama", "llama3", tmp_path)
    apply_activation_checkpointing(gpt, "offload")
    assert len({id(block.execution.offloader) for block in gpt.h}) == 1
