"""Triton, or where it is not installed what lets kernels be declared: a plan on fake tensors launches none."""

import os
from typing import Any

from lit_gpt.kernels.cuda import interpreter


class Undefined:
    """Stands for Triton's language where kernels are declared and never run."""

    constexpr = int


tl: Any
jit: Any
try:
    import triton
    import triton.language

    tl, jit = triton.language, triton.jit
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpreter.mend()
except ImportError:
    tl, jit = Undefined, lambda function: function


def power_of_2(n: int) -> int:
    """Return the least power of 2 that is at least n."""
    return 1 << max(0, n - 1).bit_length()
