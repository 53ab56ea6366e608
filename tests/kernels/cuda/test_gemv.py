"""Products of a few rows against float64, for every format, shape of launch and epilogue."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.kernels.cuda import gemv as products
from lit_gpt.kernels.cuda.dequantize import QuantizedWeight
from lit_gpt.kernels.cuda.gemv import Epilogue, InputNorm, gemv
from lit_gpt.kernels.functional import ACTIVATIONS
from lit_gpt.kernels.policy import use_policy
from lit_gpt.quantization import formats, modules
from lit_gpt.quantization.modules import QuantizedLinear

FORMATS = list(formats.FORMATS)
BYTES = {"int8": 1.1, "int4": 0.7, "nf4": 0.7, "nf4-dq": 0.7}  # of a weight, at most


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantized(name: str, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[QuantizedWeight, Tensor]:
    """Return a random weight as the kernels read it, and what it stands for, float64."""
    tensors = formats.encode(random(rows, columns), name, dtype)
    with use_policy(triton=False, cpp=False):
        exact = formats.decode(tensors, name, columns, torch.float32).double()
    return formats.FORMATS[name].for_cuda(tensors, columns), exact


def off(mine: Tensor, exact: Tensor) -> float:
    return ((mine.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("shape", [(19, 200), (5, 1100)], ids=str)
@pytest.mark.parametrize("m", [1, 3, 40])
@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_multiplied_as_the_weight_that_they_stand_for(name, m, shape):
    weight, exact = quantized(name, *shape)
    x = random(m, shape[1], seed=1)
    assert off(gemv(x, weight), x.double() @ exact.t()) < 2e-6


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("name", FORMATS)
def test_products_in_16_bits(name, m):
    weight, exact = quantized(name, 24, 192, torch.bfloat16)
    x = random(m, 192, seed=1)
    assert off(gemv(x, weight, dtype=torch.bfloat16), x.double() @ exact.t()) < (1e-5 if m == 1 else 6e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", [1, 2, 17])
def test_a_full_weight(m, dtype):
    x, weight = random(m, 330, seed=1, dtype=dtype), random(45, 330, dtype=dtype)
    made = gemv(x, weight)
    assert made.dtype == dtype
    assert off(made, x.double() @ weight.double().t()) < {torch.float32: 1e-6, torch.float16: 1e-3}.get(dtype, 4e-3)


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("name", ["full", *FORMATS])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_bias_activation_gate_and_residual_follow_the_product(activation, name, m):
    rows, columns = 38, 192
    weight, exact = quantized(name, rows, columns) if name != "full" else ((w := random(rows, columns)), w.double())
    x, bias, residual = random(m, columns, seed=1), random(rows, seed=2), random(m, rows // 2, seed=3)
    product = x.double() @ exact.t() + bias.double()
    act = ACTIVATIONS[activation] if activation else (lambda x: x)
    gate, up = product.chunk(2, -1)
    expected = residual.double() + 0.7 * act(gate) * up
    made = gemv(x, weight, Epilogue(bias, activation, True, residual, 0.7), out=residual)
    assert made is residual and off(made, expected) < 1e-5
    assert off(gemv(x, weight, Epilogue(bias, activation)), act(product)) < 1e-5


@pytest.mark.parametrize("shape", [(5, 200), pytest.param((6, 5000), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("m", [1, 20])
@pytest.mark.parametrize("name", ["full", "int8", "int4", "nf4"])
def test_rows_are_normed_before_they_are_multiplied(name, m, shape):
    weight, exact = quantized(name, *shape) if name != "full" else ((w := random(*shape)), w.double())
    x, gain = 30 * random(m, shape[1], seed=1), 1 + random(shape[1], seed=2)
    rows = F.rms_norm(x.double(), (shape[1],), gain.double(), 0.1)
    assert off(gemv(x, weight, norm=InputNorm(gain, 0.1)), rows @ exact.t()) < 2e-6
    bias = random(shape[0], seed=3)
    assert off(gemv(x, weight, Epilogue(bias), norm=InputNorm(gain, 0.1)), rows @ exact.t() + bias.double()) < 2e-6


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("m", [1, 20])
@pytest.mark.parametrize("name", ["full", "int8", "int4", "nf4-dq"])
def test_programs_that_share_columns_add_up_and_leave_their_counters_at_zero(name, m, gated):
    rows, columns = 12, 9000
    weight, exact = quantized(name, rows, columns) if name != "full" else ((w := random(rows, columns)), w.double())
    codes = weight if name == "full" else weight.codes
    outputs = rows // (2 if gated else 1)
    assert products.launch_shape(m, outputs, codes, gated, torch.float32)["SPLITS"] > 1
    x, residual = random(m, columns, seed=1), random(m, outputs, seed=3)
    product = x.double() @ exact.t()
    expected = residual.double() + (F.silu(product[:, :6]) * product[:, 6:] if gated else F.silu(product))
    for _ in range(2):
        made = gemv(x, weight, Epilogue(None, "silu", gated, residual))
        assert off(made, expected) < 1e-5
    assert not products.counters(x).any()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("m", [1, 16])
def test_a_launch_takes_no_more_bytes_than_the_format_stores(name, m, monkeypatch):
    """All tensors that a launch is given are counted, but the rows, the result, and what programs share."""
    weight, _ = quantized(name, 64, 4544, torch.bfloat16)
    taken: dict[int, Tensor] = {}

    def count(kernel, grid, x, codes, *arguments, **_):
        taken.update({id(t): t for t in (codes, *arguments[:5]) if t is not None})

    monkeypatch.setattr(products, "launch", count)
    gemv(random(m, 4544), weight)
    assert 0.5 * 64 * 4544 < sum(t.nbytes for t in taken.values()) <= BYTES[name] * 64 * 4544


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_layer_takes_few_rows_by_its_codes_and_many_by_its_weight(name, rows, monkeypatch):
    layer, x = QuantizedLinear(nn.Linear(136, 40), name), random(1, rows, 136)
    with use_policy(triton=False), torch.no_grad():
        expected = layer(x)
    calls = []
    monkeypatch.setattr(modules, "gemv", lambda *a: calls.append(1) or gemv(*a))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == (rows == 1)
