"""Triton, or where it is not installed what lets kernels be declared: a plan on fake tensors launches none."""

import os
from types import SimpleNamespace
from typing import Any

from lit_gpt.kernels.cuda import interpreter

tl: Any
jit: Any
try:
    import triton
    import triton.language

    tl, jit = triton.language, triton.jit
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpreter.mend()
except ImportError:
    tl, jit = SimpleNamespace(constexpr=int), lambda function: function


def power_of_2(n: int) -> int:
    """Return the least power of 2 that is at least n."""
    return 1 << max(0, n - 1).bit_length()
