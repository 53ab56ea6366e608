"""What the tests of kernels share."""

import pytest

from lit_gpt.kernels import ops


@pytest.fixture(params=[True, False], ids=["kernels", "formulas"])
def with_kernels(request, monkeypatch) -> bool:
    """Run each test with the C++ kernels and without; where there is no compiler, without alone."""
    if request.param and not ops.available():
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(ops, "available", lambda: request.param)
    return request.param
