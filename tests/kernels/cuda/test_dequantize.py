"""The kernel that writes a weight from its codes, against each format's formula."""

import pytest
import torch
from torch import nn

from lit_gpt.kernels.policy import use_policy
from lit_gpt.quantization import formats
from lit_gpt.quantization.modules import QuantizedLinear

FORMATS = list(formats.FORMATS)
DTYPES = torch.float32, torch.bfloat16, torch.float16


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def decoded(tensors: formats.Tensors, name: str, columns: int, dtype: torch.dtype) -> torch.Tensor:
    with use_policy(triton=False, cpp=False):
        return formats.decode(tensors, name, columns, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(30, 200), (7, 128), (3, 2100)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_is_what_the_formula_makes_of_its_codes(name, shape, dtype):
    tensors = formats.encode(random(*shape), name, dtype)
    made = formats.decode(tensors, name, shape[1], dtype)
    torch.testing.assert_close(made, decoded(tensors, name, shape[1], dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_layer_trains_what_is_before_it(name):
    layer, rows = QuantizedLinear(nn.Linear(136, 40), name), random(2, 50, 136)
    made = []
    for triton in (True, False):
        with use_policy(triton=triton, cpp=False):
            x = rows.clone().requires_grad_()
            layer(x).square().sum().backward()
            made.append((layer(x).detach(), x.grad))
    for mine, plain in zip(*made, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)
