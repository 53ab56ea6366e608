"""What a training step does on a GPU beside matrix products, traced on fake tensors: kernels and KB a token and layer.

An operation that lets the host wait for the device fails the trace.
"""

import pytest

from helpers.step_trace import per_layer

# As counted. Without Triton's kernels it is 116 and 1853 for falcon-7b's LoRA, 153 and 3099 for Llama-2-7b's.
BOUNDS = {
    ("falcon-7b", "lora", None): (20, 486),
    ("falcon-7b", "lora", "nf4"): (28, 745),
    ("falcon-7b", "adapter", None): (26, 577),
    ("falcon-7b", "adapter_v2", None): (52, 927),
    ("falcon-7b", "full", None): (16, 399),
    ("Llama-2-7b", "lora", None): (21, 648),
    ("Llama-2-7b", "lora", "nf4"): (29, 901),
    ("Llama-2-7b", "adapter", None): (27, 678),
    ("Llama-2-7b", "adapter_v2", None): (55, 1160),
    ("Llama-2-7b", "full", None): (17, 518),
}


@pytest.mark.parametrize("model, method, format", BOUNDS)
def test_kernels_and_bytes_of_a_layer(model, method, format):
    layer = per_layer(model, method, tokens=4096, format=format)
    kernels, kilobytes = BOUNDS[model, method, format]
    assert layer.kernels.total() <= kernels, layer.kernels
    assert layer.bytes.total() <= 1000 * kilobytes, layer.bytes
