"""What the tests of kernels share."""

import pytest

from lit_gpt.kernels import ops
from lit_gpt.kernels.policy import use_policy


@pytest.fixture(autouse=True)
def fused_everywhere():
    """Let the kernels serve on CPUs, too, on which torch's operators are faster."""
    with use_policy(fused=True):
        yield


@pytest.fixture(params=[True, False], ids=["kernels", "formulas"])
def with_kernels(request, monkeypatch) -> bool:
    """Run each test with the C++ kernels and without; where there is no compiler, without alone."""
    if request.param and not ops.available():
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(ops, "available", lambda: request.param)
    return request.param
