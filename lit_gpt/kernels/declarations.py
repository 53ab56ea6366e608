"""What the C++ sources declare, read from them: Python repeats no signature and no number of an enum."""

import ctypes
import re
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent / "cpp"
_TYPES = {
    "long": ctypes.c_long, "int": ctypes.c_int, "float": ctypes.c_float, "double": ctypes.c_double,
    "uint32_t": ctypes.c_uint32, "uint64_t": ctypes.c_uint64,
}  # fmt: skip
# A function that returns nothing or a pointer. In the macro BOTH its name ends in _##suffix, for each of two dtypes.
_FUNCTION = re.compile(r"^ *(void |\w+ \*)(\w+?)(_##suffix)?\(([^()]*)\) \{", re.MULTILINE)


def functions(name: str) -> dict[str, tuple[list[Any], Any]]:
    """Return the ctypes of the arguments and of the result of each function that `name`.cpp exports.

    Raises:
        KeyError: A parameter has a type that ctypes is not told about here.
    """
    signatures = {}
    for result, function, both, parameters in _FUNCTION.findall(_exported(name)):
        types = [_argument_type(parameter) for parameter in parameters.split(",") if parameter.strip()]
        for suffix in ("_bf16", "_f32") if both else ("",):
            signatures[function + suffix] = types, ctypes.c_void_p if "*" in result else None
    return signatures


def _exported(name: str) -> str:
    """Return the source of the macro BOTH, if there is one, and of the block extern "C", without comments."""
    source = re.sub(r"//.*", "", (SOURCES / f"{name}.cpp").read_text()).replace("\\\n", "\n")
    return re.split(r'#define BOTH|extern "C"', source, maxsplit=1)[1]


def _argument_type(parameter: str) -> Any:
    return ctypes.c_void_p if "*" in parameter else _TYPES[parameter.split()[0]]


def declare(library: ctypes.CDLL, name: str) -> ctypes.CDLL:
    """Let ctypes check each call of the library's functions, by number and types of the arguments."""
    for function, (arguments, result) in functions(name).items():
        exported = getattr(library, function)
        exported.argtypes, exported.restype = arguments, result
    return library


def enum(header: str, name: str) -> dict[str, int]:
    """Return the numbers of an enum of cpp/`header`, by its names in lower case."""
    (names,) = re.findall(rf"enum {name} \{{([^}}]*)\}}", (SOURCES / header).read_text())
    return {constant.strip().lower(): number for number, constant in enumerate(names.split(","))}


ACTIVATION_NUMBERS = enum("activations.h", "Activation")
FORMAT_NUMBERS = enum("products.h", "Format")
GATE_NUMBERS = enum("recurrent.h", "Gate")
