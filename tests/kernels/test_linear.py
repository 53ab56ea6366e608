"""Products of 16 bits by way of float32 are those of the formula, rounded once, in a model and alone."""

from dataclasses import replace

import pytest
import torch

from helpers.compare import off
from lit_gpt.families.registry import config_from_name
from lit_gpt.kernels import linear, products
from lit_gpt.kernels.policy import use_policy
from lit_gpt.methods.hyperparameters import FullConfig, LoRAConfig
from lit_gpt.methods.registry import make_method
from lit_gpt.model.config import Config
from lit_gpt.model.gpt import GPT, quantize
from lit_gpt.model.moe import Groups, grouped_product
from lit_gpt.quantization.formats import FORMATS
from lit_gpt.quantization.modules import QuantizedLinear, unpacked


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(linear, "WIDE_ELEMENTS", 100)  # several for each weight, the last one smaller


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_result_and_gradients_are_rounded_once(dtype, bias):
    x, weight, b = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 20, 24), (37, 24), (37,)))
    above = torch.randn(2, 20, 37, dtype=torch.float64)
    inputs = [t.to(dtype).requires_grad_() for t in (x, weight, b)[: 2 + bias]]
    with use_policy(widen=True):
        y = linear.linear(*inputs)
        grads = torch.autograd.grad(y, inputs, above.to(dtype))
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = torch.nn.functional.linear(*exact)
    expected_grads = torch.autograd.grad(expected, exact, above.to(dtype).double())
    ulp = torch.finfo(dtype).eps
    for result, right in zip((y, *grads), (expected, *expected_grads), strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), right, rtol=2 * ulp, atol=4 * ulp)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 20, 24), (33, 24)])
def test_oneDNN_computes_float32_as_exactly(shape, bias, monkeypatch):
    ours = []
    monkeypatch.setattr(linear, "_product", lambda *given, own=linear._product: ours.append(given) or own(*given))
    x, weight, b = (torch.randn(*size, dtype=torch.float64) for size in (shape, (37, 24), (37,)))
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [t.to(dtype).requires_grad_() for t in (x, weight, b)[: 2 + bias]]
        with use_policy(onednn=torch.backends.mkldnn.is_available()):
            y = linear.linear(*inputs)
        results.append((y, *torch.autograd.grad(y.sin().sum(), inputs)))
    for result, right in zip(*results, strict=True):
        assert off(result.double(), right) < 1e-6
    assert len(ours) == 3 * torch.backends.mkldnn.is_available()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("format", [None, "int8", "int4", "nf4"])
@pytest.mark.parametrize("columns", [24, 100, 1500])
def test_rows_are_multiplied_with_a_weight_as_it_is_stored(columns, format, dtype):
    """Each is what it would be alone, whatever the others are."""
    layer = torch.nn.Linear(columns, 37).to(dtype)
    x, weight = torch.randn(530, columns, dtype=dtype), layer.weight
    if not products.supports_linear(x, weight.detach()):
        pytest.skip("no kernels")
    x[2, 1], stored = torch.inf, (weight, None, None, None)
    if format:
        layer = QuantizedLinear(layer, format)
        weight, stored = layer.dequantize(), FORMATS[format].for_kernels(unpacked(layer))
    y = products.linear(x, *stored, layer.bias)
    expected = torch.nn.functional.linear(x.double(), weight.double(), layer.bias.double())
    others = torch.arange(530) != 2
    assert y.dtype == dtype and off(y[others].double(), expected[others]) < (0.004 if dtype == torch.bfloat16 else 1e-6)
    assert not y[2].isfinite().any()
    assert torch.equal(y[7:12], products.linear(x[7:12], *stored, layer.bias))
    assert format is None or torch.equal(y[3:20], layer(x[3:20]))


def test_autocast_keeps_its_dtype():
    x, weight = torch.randn(20, 24), torch.randn(37, 24)
    with use_policy(onednn=True), torch.autocast("cpu", torch.bfloat16):
        assert linear.linear(x, weight).dtype == torch.bfloat16


def test_only_what_needs_it_goes_that_way():
    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    with use_policy(widen=True):
        assert linear.arithmetic(cpu, bf16) == torch.float32
        assert linear.arithmetic(cpu, torch.float32) == torch.float32
        assert linear.arithmetic(torch.device("cuda"), bf16) == bf16
        with use_policy(simulate_cuda=True):
            assert linear.arithmetic(cpu, bf16) == bf16
    with use_policy(widen=False):
        assert linear.arithmetic(cpu, bf16) == bf16


@pytest.mark.parametrize("format", [None, "int8", "nf4"])
@pytest.mark.parametrize("family", ["falcon-7b", "SmolLM2-135M"])
def test_a_model_in_bf16_is_as_near_to_float32(family, format):
    config = tiny(config_from_name(family))
    model = GPT(config)
    exact = model(tokens := torch.randint(config.vocab_size, (1, 40)))
    model = model.bfloat16()
    model = quantize(model, format) if format else model
    errors = {}
    for widen in (True, False):
        with use_policy(widen=widen), torch.no_grad():
            errors[widen] = (model(tokens).float() - exact).norm() / exact.norm()
    bound = 0.3 if format == "nf4" else 0.02
    assert errors[True] < bound and abs(errors[True] - errors[False]) < 0.005, errors


def tiny(config: Config) -> Config:
    size = {"n_layer": 2, "n_embd": 64, "n_head": 4, "head_size": 16, "intermediate_size": 96}
    groups = 1 if config.n_query_groups == 1 else 2
    return replace(config, **size, n_query_groups=groups, vocab_size=96, padded_vocab_size=96, block_size=64)


def test_experts():
    groups = Groups(torch.tensor([0] * 20 + [2] * 10), 3)
    x, weight = torch.randn(30, 24).bfloat16().requires_grad_(), torch.randn(3, 10, 24).bfloat16()
    with use_policy(widen=True):
        y = grouped_product(x, weight, groups)
        (grad,) = torch.autograd.grad(y.sum(), x)
    exact = torch.cat((x[:20].double() @ weight[0].double().t(), x[20:].double() @ weight[2].double().t()))
    torch.testing.assert_close(y.double(), exact, rtol=0.01, atol=0.03)
    torch.testing.assert_close(grad[0].double(), weight[0].double().sum(0), rtol=0.01, atol=0.03)


def test_no_autocast_to_what_is_not_computed_in():
    full, lora = make_method("full", FullConfig()), make_method("lora", LoRAConfig())
    for widen in (True, False):
        with use_policy(widen=widen), full.autocast("bf16", "cpu"):
            assert torch.is_autocast_enabled("cpu") is not widen
    with lora.autocast("bf16", "cpu"):
        assert not torch.is_autocast_enabled("cpu")
