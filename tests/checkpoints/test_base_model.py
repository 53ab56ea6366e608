"""A base that is opened for answers holds its weights in one piece of memory."""

import pytest
import torch

from lit_gpt.checkpoints.base_model import BaseCheckpoint
from lit_gpt.hardware import ALIGNMENT, gathered


def storages(model: torch.nn.Module) -> set[int]:
    tensors = [*model.parameters(), *model.buffers()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def test_gathered_tensors_are_what_they_were_and_lie_in_one_piece():
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7, dtype=torch.int8), "c": torch.randn(2).bfloat16()}
    found = gathered(tensors.items(), tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 1
    assert all(tensor.storage_offset() * tensor.element_size() % ALIGNMENT == 0 for tensor in found.values())


def test_what_the_layout_has_otherwise_comes_as_it_is():
    tensors = {"other shape": torch.randn(3), "unknown": torch.randn(2)}
    found = gathered(tensors.items(), {"other shape": torch.empty(4)})
    assert found["other shape"] is tensors["other shape"] and found["unknown"] is tensors["unknown"]


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_resident_base_is_the_mapped_one_in_one_piece(llama, quantize):
    mapped, resident = (BaseCheckpoint.open(llama, quantize, resident=kind).build() for kind in (False, True))
    assert len(storages(resident)) < len(storages(mapped))
    idx = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(resident(idx), mapped(idx))


def test_the_models_of_a_base_share_its_memory(llama):
    base = BaseCheckpoint.open(llama, resident=True)
    assert storages(base.build()) & storages(base.build())
