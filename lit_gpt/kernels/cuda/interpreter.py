"""Mends the interpreter of Triton 3.6, by which kernels run on a CPU where TRITON_INTERPRET is 1."""

import importlib
from typing import Any

import numpy as np


def mend() -> None:
    """Let loops go up to a number that a kernel is given, round to bfloat16 to the nearest, and multiply such."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    tl = interpreter.tl
    patch_tensor, builder = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())  # NumPy 2.4 has no int() of arrays

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:  # which is kept as integers, and multiplied as such
            a, b = cast(self, a, tl.float32), cast(self, b, tl.float32)
        return dot(self, a, b, *rest)

    def cast_impl(self: Any, x: Any, dtype: Any) -> Any:
        if x.dtype.scalar.is_int() and dtype.scalar == tl.bfloat16:  # which is taken for the bits of one
            x = cast(self, x, tl.float32)
        if x.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:  # which is cut off
            bits = x.data.view(np.uint32)
            nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
            return interpreter.TensorHandle(np.where(np.isnan(x.data), 0x7FC0, nearest).astype(np.uint16), tl.bfloat16)
        return cast(self, x, dtype)

    interpreter._patch_lang_tensor, builder.create_dot, builder.cast_impl = patch_lang_tensor, create_dot, cast_impl
