"""Every kernel of decoding is compiled for GPUs that are not there, by the launches that its wrapper makes."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from helpers.paths import ROOT

pytestmark = [
    pytest.mark.slow,  # a minute for each; test_ahead_of_time.py has the quicker ones of training
    pytest.mark.subprocess,
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed"),
]
KERNELS = {
    "gemv_kernel", "dequantize_int8", "dequantize_four_bit", "attend_kernel", "prefix_kernel", "embed_kernel",
    "norm_kernel", "up_kernel", "row_down_kernel", "row_up_kernel", "noise_kernel",
}  # fmt: skip


@pytest.mark.parametrize(
    "dtypes, capabilities", [("bfloat16", "90"), ("bfloat16", "80,100"), ("float16,float32", "90")]
)
def test_no_kernel_spills_its_registers(dtypes, capabilities, tmp_path):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    program = [sys.executable, str(ROOT / "tests/helpers/ahead_of_decoding.py"), dtypes, capabilities]
    done = subprocess.run(program, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"] for row in compiled} == KERNELS
    assert not [row for row in compiled if row["stack"]]
