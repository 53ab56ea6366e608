"""What a training step does on a GPU beside matrix products, traced on fake tensors: kernels and KB a token and layer.

An operation that lets the host wait for the device fails the trace.
"""

import pytest
from torch._dynamo.utils import counters

from helpers.step_trace import per_layer, trace_step

TOKENS = 4096

BOUNDS = {  # kernels, KB; for reference, before Triton: falcon-7b lora 85 and 1005, Llama-2-7b lora 120 and 2270
    ("falcon-7b", "lora"): (20, 487),
    ("falcon-7b", "adapter"): (24, 577),
    ("falcon-7b", "adapter_v2"): (52, 930),
    ("falcon-7b", "full"): (15, 410),
    ("Llama-2-7b", "lora"): (21, 652),
    ("Llama-2-7b", "adapter"): (24, 680),
    ("Llama-2-7b", "adapter_v2"): (60, 1200),
    ("Llama-2-7b", "full"): (17, 520),
}


@pytest.mark.parametrize("model, method", BOUNDS, ids="-".join)
def test_kernels_and_bytes_of_a_layer(model, method):
    layer = per_layer(model, method, TOKENS)
    kernels, kilobytes = BOUNDS[model, method]
    assert layer.kernels.total() <= kernels, layer.kernels
    assert layer.bytes.total() <= 1000 * kilobytes, layer.bytes
