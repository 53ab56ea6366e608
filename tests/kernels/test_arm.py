"""The kernels on ARM, in an emulator: compiled for processors with and without bfloat16. Untried on a real one.

Debian has both under the names g++-aarch64-linux-gnu and qemu-user.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from lit_gpt.kernels import build

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
CHECK = Path(__file__).parent / "arm" / "check.cpp"
LIBRARIES = (*build.OPERATORS, "decode")


@pytest.mark.slow  # half a minute each
@pytest.mark.subprocess
@pytest.mark.skipif(not shutil.which(COMPILER), reason=f"no {COMPILER}")
@pytest.mark.skipif(not shutil.which(EMULATOR), reason=f"no {EMULATOR}")
@pytest.mark.parametrize("processor", ["armv8.2-a+dotprod", "armv8.6-a+bf16+i8mm"])
def test_kernels_are_the_formulas(tmp_path, processor):
    flags = [flag for flag in build.FLAGS if flag != "-shared"] + ["-fopenmp"]
    sources = [build.SOURCES / f"{name}.cpp" for name in LIBRARIES]
    flags += [f"-march={processor}", "-static", "-I", build.SOURCES]
    argv = [COMPILER, *flags, CHECK, *sources, "-o", tmp_path / "check"]
    subprocess.run(argv, check=True)
    result = subprocess.run([EMULATOR, "-cpu", "max", tmp_path / "check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 bits, bfloat16, fast x 5" in result.stdout and "OFF" not in result.stdout
