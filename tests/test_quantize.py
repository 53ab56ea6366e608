"""Quantization: each format against its definition, the layers against plain ones, and the scripts with it."""

import pytest
import torch
import torch.nn.functional as F
from conftest import Tiny
from test_families import off, tokens
from test_train import data_dir, final, flags, identical, spawn, wait_for_step  # noqa: F401 (fixtures among them)
from torch import nn

from lit_gpt import GPT, quantize
from lit_gpt.loss import summed_cross_entropy
from lit_gpt.plan import Live

FORMATS = list(quantize.FORMATS)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """So that a weight of a test is worked on in several."""
    monkeypatch.setattr(quantize, "PIECE", {"cpu": 1000})


def weight(rows: int = 30, columns: int = 200, dtype=torch.float32) -> torch.Tensor:
    """Rows of different size, an outlier, a row of zeros, one of a constant; 200 columns do not fill the last group."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 0, rows).unsqueeze(1)
    w[3, 5] *= 40
    w[7], w[9] = 0.0, 0.3
    return w.to(dtype)


def there_and_back(w: torch.Tensor, name: str, dtype=torch.float32) -> torch.Tensor:
    return quantize.decode(quantize.encode(w, name, dtype), name, w.size(1), dtype)


def groups_of(w: torch.Tensor) -> list[torch.Tensor]:
    return list(w.split(quantize.GROUP, dim=1))


def test_int8_is_off_by_half_a_step_at_most():
    w = weight()
    step = w.abs().amax(1, keepdim=True) / 127 * (1 + 2**-7)  # of a scale rounded up to bfloat16
    assert ((there_and_back(w, "int8") - w).abs() <= step / 2).all()


def test_int4_is_off_by_half_a_step_or_cut_and_better_than_the_groups_range():
    w = weight(columns=192)
    found = quantize.encode(w, "int4", torch.float32)
    back = quantize.decode(found, "int4", w.size(1), torch.float32)
    for i, (group, mine) in enumerate(zip(groups_of(w), groups_of(back), strict=True)):
        scale, zero = found["scale"][:, i : i + 1], found["zero"][:, i : i + 1]
        expected = scale * ((group - zero) / scale.clamp(min=1e-30)).round().clamp(0, 15) + zero
        assert torch.allclose(mine, expected, rtol=0, atol=1e-7)
        low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
        step = (high - low) / 15
        nearest = step * ((group - low) / step.clamp(min=1e-30)).round() + low
        errors = (mine - group).square().sum(1), (nearest - group).square().sum(1)
        varied = (high > low).squeeze(1)
        assert (errors[0] <= errors[1])[varied].all() and errors[0][varied].sum() < 0.95 * errors[1][varied].sum()


def test_nf4_values_are_those_of_the_paper():
    """Quantiles of the normal distribution (appendix E), as listed there; zero is one of them."""
    listed = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    assert torch.allclose(torch.tensor(quantize.NF4.VALUES), torch.tensor(listed), rtol=0, atol=1e-6)


def nearest_values(w: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    values = torch.tensor(quantize.NF4.VALUES)
    parts = []
    for group, m in zip(groups_of(w), absmax.T, strict=True):
        scaled = group / m.clamp(min=1e-30).unsqueeze(1)
        parts.append(values[(scaled.unsqueeze(-1) - values).abs().argmin(-1)] * m.unsqueeze(1))
    return torch.cat(parts, dim=1)


def test_nf4_is_the_nearest_value_times_the_blocks_absmax():
    w = weight()
    absmax = torch.stack([group.abs().amax(1) for group in groups_of(w)], dim=1)
    assert torch.equal(quantize.encode(w, "nf4", torch.bfloat16)["absmax"], absmax)
    assert torch.allclose(there_and_back(w, "nf4"), nearest_values(w, absmax), rtol=0, atol=1e-7)


def test_double_quantization_of_the_absmax():
    """In blocks of 256, 8 bits, after their mean is taken off; off by half a step at most."""
    w = weight(rows=150)
    plain, double = quantize.encode(w, "nf4", torch.float32), quantize.encode(w, "nf4-dq", torch.float32)
    absmax = plain["absmax"].flatten()
    assert double["absmax"].dtype == torch.int8 and torch.equal(plain["weight"], double["weight"])
    assert torch.allclose(double["absmax_mean"], absmax.mean())
    found = quantize.FORMATS["nf4-dq"].unpack(double)["absmax"].flatten()
    blocks = (absmax - absmax.mean()).split(256)
    steps = torch.stack([block.abs().max() / 127 for block in blocks])
    assert len(blocks) == 3 and torch.allclose(double["absmax_scale"], steps)
    steps = steps.repeat_interleave(256)[: len(absmax)]
    assert ((found - absmax).abs() <= steps * 0.501).all() and not torch.equal(found, absmax)


@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4.5), ("nf4", 4.5), ("nf4-dq", 4.127)])
def test_bits_per_weight(name, bits):
    with torch.device("meta"):
        layer = quantize.QuantizedLinear(nn.Linear(1024, 4096, bias=False, dtype=torch.bfloat16), name)
    held = 8 * sum(p.nbytes for p in layer.parameters()) / (1024 * 4096)
    assert held == pytest.approx(bits, abs=0.02)


@pytest.mark.parametrize("name", FORMATS)
def test_whatever_the_precision_the_weights_are_the_same(name):
    """What is stored beside codes loses nothing in bfloat16, or is kept in float32."""
    w = weight(dtype=torch.bfloat16)
    narrow, wide = (quantize.encode(w, name, dtype) for dtype in (torch.bfloat16, torch.float32))
    exact = quantize.decode(wide, name, w.size(1), torch.float32)
    assert torch.equal(quantize.decode(narrow, name, w.size(1), torch.float32), exact)
    assert torch.equal(quantize.decode(narrow, name, w.size(1), torch.bfloat16), exact.bfloat16())  # rounded once


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_the_backward_pass_is_autograds_through_the_dequantized_weight(name, dtype):
    linear = nn.Linear(200, 30, dtype=dtype)
    linear.weight.data.copy_(weight())
    layer = quantize.QuantizedLinear(linear, name)
    x = torch.randn(2, 5, 200, dtype=dtype, requires_grad=True)
    y = layer(x)
    expected = F.linear(x, layer.dequantize(dtype), linear.bias.detach())
    assert torch.equal(y, expected)
    grad = torch.randn_like(y)
    (mine,), (theirs,) = torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, x, grad)
    assert off(mine.float(), theirs.float()) < (1e-12 if dtype == torch.float64 else 1e-2)


def test_the_backward_pass_keeps_no_dequantized_weight():
    layer = quantize.QuantizedLinear(nn.Linear(512, 512, bias=False), "nf4")
    x = torch.randn(8, 512, requires_grad=True)
    with Live() as live:
        y = layer(x)
        assert live.now == y.nbytes + sum(p.nbytes for p in layer.parameters())
        assert live.peak > live.now + 4 * 512 * 512


def test_a_head_that_is_used_piece_by_piece_is_dequantized_once(monkeypatch):
    layer = quantize.QuantizedLinear(nn.Linear(64, 96, bias=False), "int8")
    hidden, labels = torch.randn(40, 64, requires_grad=True), torch.randint(96, (40,))
    count, decode = [], quantize.decode
    monkeypatch.setattr(quantize, "decode", lambda *args: count.append(1) or decode(*args))
    monkeypatch.setattr("lit_gpt.loss.MAX_LOGITS", 960)  # 10 tokens
    summed_cross_entropy(layer, hidden, labels).backward()
    assert len(count) == 1 and layer.held is None
    with torch.no_grad():
        summed_cross_entropy(layer, hidden, labels)
    assert len(count) == 2


def quantized(tiny: Tiny, name: str, dtype=torch.float32) -> GPT:
    return GPT.from_checkpoint(tiny.folder, dtype, quantize=name)


def plain_like(model: GPT) -> GPT:
    """A model without quantization that has the quantized one's weights."""
    plain = GPT(model.config).to(model.dtype).eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            layer = model.get_submodule(name.rpartition(".")[0])
            parameter.copy_(quantize.weight_of(layer) if name.endswith(".weight") else layer.bias)
    return plain


@torch.no_grad()
@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_model_is_that_of_its_dequantized_weights(tiny: Tiny, name):
    model, idx = quantized(tiny, name), tokens(tiny.hf)
    plain = plain_like(model)
    assert off(model(idx), plain(idx)) < 1e-5
    assert off(model(idx), GPT.from_checkpoint(tiny.folder)(idx)) > 1e-4
    cache = model.kv_cache(2, idx.size(1))
    steps = [idx[:, :17], *idx[:, 17:].split(1, dim=1)]
    assert off(torch.cat([model(step, cache=cache) for step in steps], dim=1), plain(idx)) < 1e-5
    assert quantize.count_parameters(model) == sum(p.numel() for p in plain.parameters())
    linears = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    assert not linears and not any(p.requires_grad for p in model.h.modules() if isinstance(p, nn.Parameter))
    if model.config.tie_embeddings:
        assert model.lm_head.weight is model.wte.weight and model.lm_head.scale is model.wte.scale
    bf16 = quantized(tiny, name, torch.bfloat16)
    assert bf16.dtype == bf16(idx).dtype == torch.bfloat16
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(tensors_of(bf16), tensors_of(model), strict=True))


def tensors_of(model: GPT) -> list[torch.Tensor]:
    layers = [module for module in model.modules() if isinstance(module, quantize.Quantized)]
    return [layer.get_parameter(key) for layer in layers for key in layer.keys]
