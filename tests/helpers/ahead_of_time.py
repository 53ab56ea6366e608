"""Compile Triton kernels for GPUs that are not there, and tell what they take of a multiprocessor.

As a program, given dtypes and compute capabilities, it prints a line for each kernel of training, in JSON: what it is,
how many registers a thread has, and the bytes of its stack, to which registers are spilled. TRITON_INTERPRET must be 0.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_gpt.kernels import functional
from lit_gpt.kernels.cuda import ops
from lit_gpt.kernels.cuda.launch import Launch, recorded

POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32",
    torch.int8: "*i8", torch.uint8: "*u8",
}  # fmt: skip


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Return the types of a launch's arguments, the constants, and which arguments are multiples of 16."""
    types, constants, attributes = {}, dict(launch.constants), {}
    for i, (name, x) in enumerate(launch.named.items()):
        if isinstance(x, Tensor):
            types[name] = POINTERS[x.dtype]
        elif x is None:
            constants[name] = None
        else:
            types[name] = "fp32" if isinstance(x, float) else "i32" if abs(x) < 2**31 else "i64"
        if isinstance(x, Tensor) or (type(x) is int and x % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return {name: types.get(name, "constexpr") for name in launch.kernel.arg_names}, constants, attributes


def resources(launch: Launch, capability: int) -> tuple[int, int]:
    """Compile a launch's kernel; return the registers of a thread, and the bytes of its stack."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, attributes = signature(launch)
    source = ASTSource(launch.kernel, types, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+)", told)
    return int(found[0]), int(found[1])


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """Return one launch of each that is compiled alike."""
    found = {}
    for launch in launches:
        key = launch.kernel.__name__, launch.warps, launch.stages, *map(str, signature(launch))
        found.setdefault(key, launch)
    return list(found.values())


def of_training(dtype: torch.dtype) -> list[Launch]:
    """Return the launches of every kernel of training with a 7B's shapes."""
    with FakeTensorMode(), recorded() as launches:
        x, wide = torch.empty(4096, 4544, dtype=dtype), torch.empty(4096, 2 * 11008, dtype=dtype)
        weight, numbers = x.new_empty(4544), x.new_empty(4096, 1, dtype=torch.float32)
        for centered in (True, False):
            kind, means = ops.Norm(1e-5, centered), numbers if centered else None
            ops.norm(x, weight, weight if centered else None, kind)
            ops.norm(x, weight, None, kind, added=x)
            for others in (None, x):
                ops.norm_backward(x, x, weight, means, numbers, kind, others)
                ops.norm_backward(x, x, weight, means, numbers, kind, others, True, centered)
        for name in functional.ACTIVATIONS:
            ops.gated_backward(ops.gated(wide, name), wide, name)
        ops.sum_of_three(x, x, x)
        scale = numbers.new_empty(4544)
        ops.scaled_backward(ops.scaled(x, scale, scale), x, scale, scale)
        ops.cross_entropy_(x.new_empty(4096, 65024), x.new_empty(4096, dtype=torch.int64))
        for heads, size in ((73, 64), (96, 128)):
            qkv, angles = x.new_empty(1, 4096, heads * size), x.new_empty(4096, size)
            ops.rotate_(qkv, angles, angles, heads - 1, size)
            parts = qkv.split([(heads - 2) * size, size, size], dim=-1)
            ops.rotated(parts, angles, angles, heads - 1, size, -1.0)
        for r in (8, 16, 64):
            y, keys = x.new_empty(4096, 4672), x.new_empty(4096, dtype=torch.int64)
            A, B = numbers.new_empty(2 * r, 4544), numbers.new_empty(4608, r)
            for given, dropped in ((x, keys), (x, None), (None, keys)):
                rest = dropped, 60000, [0, 4608], [4544, 4672], 2.0
                low = ops.lora_(y, x, A, B, *rest)
                ops.lora_backward(y, given, A, B, *rest, low)
    return distinct(launches)


def report(launches: Callable[[torch.dtype], list[Launch]]) -> None:
    """Print the program's lines, for the dtypes and capabilities of its arguments."""
    names, capabilities = (argument.split(",") for argument in sys.argv[1:])
    for name in names:
        for launch in launches(getattr(torch, name)):
            for capability in map(int, capabilities):
                registers, stack = resources(launch, capability)
                row = {"kernel": launch.kernel.__name__, "dtype": name, "capability": capability}
                row |= {"warps": launch.warps, "registers": registers, "stack": stack}
                print(json.dumps(row | {"constants": {k: str(v) for k, v in launch.constants.items()}}), flush=True)


if __name__ == "__main__":
    report(of_training)
