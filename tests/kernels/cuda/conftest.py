"""Triton kernels are tested where they are compiled, on a GPU, and elsewhere by Triton's interpreter."""

from collections.abc import Iterator

import pytest
import torch

from lit_gpt.kernels.cuda import launch
from lit_gpt.kernels.policy import use_policy


@pytest.fixture(autouse=True)
def on_cuda(same_kernels: None) -> Iterator[None]:
    """Choose kernels as on a CUDA device, and let fresh memory be NaN, so that what a kernel leaves out is seen."""
    if not torch.cuda.is_available() and not launch.interpreted():
        pytest.skip("triton is not installed")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with use_policy(simulate_cuda=True):
        assert torch.empty(1).isnan().all()
        yield
    torch.use_deterministic_algorithms(before)
