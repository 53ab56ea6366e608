"""Every kernel of decoding is compiled for GPUs that are not there, by the launches that its wrapper makes."""

import importlib.util

import pytest

from helpers.triton_kernels import compile_ahead

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
    compiled = compile_ahead("ahead_of_decoding.py", dtypes, capabilities, tmp_path)
    assert {row["kernel"] for row in compiled} == KERNELS
    assert not [row for row in compiled if row["stack"]]
