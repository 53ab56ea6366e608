"""Every kernel of training is compiled for GPUs that are not there, by the launches that its wrapper makes."""

import importlib.util

import pytest

from helpers.triton_kernels import compile_ahead

pytestmark = [
    pytest.mark.subprocess,
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed"),
]
REGISTERS = 65536  # of a multiprocessor
KERNELS = {
    "norm_kernel", "norm_backward_kernel", "lora_down_kernel", "lora_up_kernel", "lora_grad_kernel",
    "lora_input_kernel", "rotate_kernel", "rotate_parts_kernel", "gated_kernel", "gated_backward_kernel",
    "cross_entropy_kernel", "sum_kernel", "scale_kernel", "scale_backward_kernel",
}  # fmt: skip


@pytest.mark.parametrize(
    "dtypes, capabilities",
    [
        pytest.param("bfloat16", "90", id="H100"),
        pytest.param("bfloat16", "80,100", id="A100 and B200", marks=pytest.mark.slow),
        pytest.param("float16,float32", "80,90,100", id="others", marks=pytest.mark.slow),
    ],
)
def test_no_kernel_spills_its_registers(dtypes, capabilities, tmp_path):
    compiled = compile_ahead("ahead_of_time.py", dtypes, capabilities, tmp_path)
    assert {row["kernel"] for row in compiled} == KERNELS
    for row in compiled:
        assert row["stack"] == 0, row
        programs = REGISTERS // (32 * row["warps"] * row["registers"])  # that a multiprocessor has room for
        assert programs * row["warps"] >= 8, row
