"""Whole models with the choices made on CUDA, attention apart: loss and gradients as by torch's operations."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from threading import Thread

import pytest
import torch
from torch import Tensor

from helpers.compare import off
from helpers.steps import random_row, step
from helpers.triton_kernels import DEVICE
from lit_gpt.families.registry import config_from_name
from lit_gpt.kernels.cuda.launch import recorded
from lit_gpt.kernels.policy import use_policy
from lit_gpt.methods.registry import config_class, make_method
from lit_gpt.model.gpt import GPT, quantize
from lit_gpt.training.memory.activation_checkpointing import apply_activation_checkpointing

SIZE = {"n_layer": 2, "n_embd": 64, "n_head": 4, "head_size": 16, "intermediate_size": 48, "vocab_size": 96}


def model(name: str, method: str, format: str | None) -> GPT:
    config = config_from_name(name)
    groups = 1 if config.n_query_groups == 1 else 2
    torch.manual_seed(0)
    base = GPT(replace(config, **SIZE, padded_vocab_size=96, block_size=64, n_query_groups=groups))
    settings = config_class(method)()
    for key, value in {"dropout": 0.2, "start_layer": 1, "key": True, "mlp": True, "head": True}.items():
        settings = replace(settings, **{key: value}) if hasattr(settings, key) else settings
    gpt = make_method(method, settings).attach(quantize(base, format) if format else base).train()
    for _, parameter in sorted(gpt.named_parameters()):
        if parameter.requires_grad and method != "full":  # what is new is zero, and would pass on no gradient
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return gpt.to(DEVICE)


@pytest.mark.parametrize(
    "name, method, format",
    [
        ("falcon-7b", "lora", None),
        ("Llama-2-7b", "lora", "nf4"),
        ("falcon-7b", "adapter_v2", None),
        pytest.param("falcon-40b", "full", None, marks=pytest.mark.slow),
        pytest.param("gemma-2b", "lora", None, marks=pytest.mark.slow),
        ("Qwen3-0.6B", "full", None),
    ],
)
def test_gradients(name, method, format):
    gpt, row = model(name, method, format), random_row((9, 1, 15)).to(torch.device(DEVICE))
    with recorded() as launches:
        found = step(gpt, row)
    with use_policy(triton=False, cpp=False):
        expected = step(gpt, row)
    assert len({launch.kernel.__name__ for launch in launches}) > 4
    assert all(off(a.double(), b.double()) < 1e-4 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["none", "selective", "full", pytest.param("offload", marks=pytest.mark.slow)])
def test_backward_keeps_the_choice_of_kernels_on_another_thread(kind):
    gpt, row = model("Llama-2-7b", "lora", "nf4"), random_row((2, 1)).to(torch.device(DEVICE))
    apply_activation_checkpointing(gpt, kind)

    def launched(backward: Callable[[Tensor], None]) -> Counter[str]:
        loss = gpt(row.idx, segments=row.segments, targets=row.targets)
        with recorded() as launches:
            backward(loss)
        return Counter(launch.kernel.__name__ for launch in launches)

    def on_another_thread(loss: Tensor) -> None:
        thread = Thread(target=loss.backward)
        thread.start()
        thread.join()

    assert launched(on_another_thread) == launched(Tensor.backward)
