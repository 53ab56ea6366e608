"""Kernels in C++ for the CPU: a library for each .cpp file beside this one, compiled when it is first wanted.

That takes a few seconds and is done once: what comes out is kept, by a hash of all that goes into it, in
~/.cache/lit_gpt. Without a C++ compiler there are no kernels, and who asks for them takes torch's formulas instead.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from lit_gpt.kernels.declarations import SOURCES, declare

# Sums may be reordered, as vectors need it; infinities and NaN stay what they are.
FLAGS = [
    "-std=c++17", "-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
    "-fassociative-math", "-Wno-psabi",
]  # fmt: skip


def machine_flags() -> list[str]:
    """Return the flags for this processor, or a lesser one that LIT_GPT_MARCH names, such as haswell, and for threads.

    Apple's compiler has OpenMP, but no library of it: torch brings one. That is untried on a Mac so far.
    """
    processor = os.environ.get("LIT_GPT_MARCH", "native")
    if sys.platform != "darwin":
        return [f"-march={processor}", "-fopenmp"]
    (torch,) = find_spec("torch").submodule_search_locations  # type: ignore[union-attr, misc]
    return [f"-mcpu={processor}", "-Xclang", "-fopenmp", f"-I{torch}/include", f"-L{torch}/lib", "-lomp"]


OPERATORS = ("layers", "lora", "attention", "dequantize", "linear")  # the libraries of lit_gpt.kernels.ops


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """Return the library of `name`.cpp, or None where it cannot be had, which is told once on stderr."""
    compiler = find_compiler()
    if compiler is None:
        print("no C++ compiler found (g++): the CPU goes without the faster kernels", file=sys.stderr)
        return None
    try:
        path = cache_folder() / f"{name}-{fingerprint(compiler, name)}.so"
        if not path.exists():
            compile_to(path, compiler, SOURCES / f"{name}.cpp")
        try:
            return declare(ctypes.CDLL(str(path)), name)
        except OSError:  # it was damaged since
            compile_to(path, compiler, SOURCES / f"{name}.cpp")
            return declare(ctypes.CDLL(str(path)), name)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).splitlines()
        said = next((line for line in said if "error" in line), said[0])
        print(f"the CPU goes without the faster kernels, {compiler} failed: {said}", file=sys.stderr)
        return None


def find_compiler() -> str | None:
    """Return the path of the compiler: $CXX, or g++."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "g++"))), None)


def cache_folder() -> Path:
    """Return the folder of the compiled libraries, and make it if there is none."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_gpt"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def fingerprint(compiler: str, name: str) -> str:
    """Return a hash of all that the library depends on: sources, flags, compiler, processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    sources = [path.read_bytes() for path in (*sorted(SOURCES.glob("*.h")), SOURCES / f"{name}.cpp")]
    return digest(version, processor("flags", "Features").encode(), repr(FLAGS + machine_flags()).encode(), *sources)


def digest(*parts: bytes) -> str:
    """Return a short hash of all parts."""
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def processor(*fields: str) -> str:
    """Return the first line about the processor that begins with one of these words, or what Python knows of it."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else [platform.processor()]
    return next((line for line in lines if line.startswith(fields)), lines[0])


def compile_to(path: Path, compiler: str, source: Path) -> None:
    """Compile a source, first to a file of its own: several processes may do so at once, and one may be killed."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(descriptor)
    try:
        argv = [compiler, *FLAGS, *machine_flags(), str(source), "-o", temporary]
        subprocess.run(argv, check=True, capture_output=True, text=True)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
