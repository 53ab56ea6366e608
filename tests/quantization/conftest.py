"""What the tests of quantization share."""

import pytest

from lit_gpt.quantization import formats


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Make chunks so small that a test's weight is cut into several."""
    monkeypatch.setattr(formats, "CPU_CHUNK", 8000)
