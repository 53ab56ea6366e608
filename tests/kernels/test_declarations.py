"""What Python reads of the C++ sources: each exported function has its signature, and wrong calls are refused."""

import ctypes
import re
import shutil
import subprocess

import pytest

from lit_gpt.kernels import build, functional, ops
from lit_gpt.kernels.declarations import ACTIVATION_NUMBERS, FORMAT_NUMBERS, SOURCES, functions

LIBRARIES = sorted(path.stem for path in SOURCES.glob("*.cpp"))


def test_the_numbers_are_those_of_the_enums():
    assert list(ACTIVATION_NUMBERS) == list(functional.ACTIVATIONS)
    assert set(ops.GATED_ACTIVATIONS) <= set(ACTIVATION_NUMBERS)
    assert FORMAT_NUMBERS["float32"] == 0 and FORMAT_NUMBERS["bfloat16"] == 1 and FORMAT_NUMBERS["int8"] == 2


def test_signatures_are_read_in_order():
    p, n, i, f = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
    assert functions("layers")["rms_norm_bf16"] == ([n, i, p, p, f, f, p, p], None)
    assert functions("attention")["attention_backward_f32"] == ([p] * 11, None)
    assert functions("decode")["tape_new"] == ([], p)
    assert functions("decode")["tape_run"] == ([p, p, n, p, n, i], None)


@pytest.mark.skipif(not shutil.which("g++") or not shutil.which("nm"), reason="no g++")
@pytest.mark.parametrize("name", LIBRARIES)
def test_every_exported_function_is_declared(name):
    library = build.library(name)
    symbols = subprocess.run(["nm", "-D", "--defined-only", library._name], capture_output=True, text=True)
    exported = set(re.findall(r" T (?!_)(\w+)$", symbols.stdout, re.MULTILINE))
    assert exported == set(functions(name)) and exported


@pytest.mark.skipif(not ops.available(), reason="no C++ compiler")
@pytest.mark.parametrize("arguments", [(), (1, 2, 3), (1.5, 8, None, None, 1e-5, 0.0, None, None)])
def test_a_wrong_call_is_refused(arguments):
    with pytest.raises((TypeError, ctypes.ArgumentError)):
        build.library("layers").rms_norm_f32(*arguments)
