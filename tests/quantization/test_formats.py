"""Each format of quantization against its definition, and the layers against plain ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.compare import off
from lit_gpt.kernels import ops
from lit_gpt.kernels.policy import use_policy
from lit_gpt.model.loss import summed_cross_entropy
from lit_gpt.quantization import formats, modules
from lit_gpt.training.memory.tracker import MemoryTracker

FORMATS = list(formats.FORMATS)


def weight(rows: int = 30, columns: int = 200, dtype=torch.float32) -> torch.Tensor:
    """Return rows of different size, an outlier, a row of zeros, one of a constant; the last group is not full."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 0, rows).unsqueeze(1)
    w[3, 5] *= 40
    w[7], w[9] = 0.0, 0.3
    return w.to(dtype)


def there_and_back(w: torch.Tensor, name: str, dtype=torch.float32) -> torch.Tensor:
    return formats.decode(formats.encode(w, name, dtype), name, w.size(1), dtype)


def groups_of(w: torch.Tensor) -> list[torch.Tensor]:
    return list(w.split(formats.GROUP, dim=1))


def test_int8_is_off_by_half_a_step_at_most():
    w = weight()
    step = w.abs().amax(1, keepdim=True) / 127 * (1 + 2**-7)  # of a scale rounded up to bfloat16
    assert ((there_and_back(w, "int8") - w).abs() <= step / 2).all()


def test_int4_is_off_by_half_a_step_or_cut_and_better_than_the_groups_range():
    w = weight(columns=192)
    encoded = formats.encode(w, "int4", torch.float32)
    back = formats.decode(encoded, "int4", w.size(1), torch.float32)
    for i, (group, mine) in enumerate(zip(groups_of(w), groups_of(back), strict=True)):
        scale, zero = encoded["scale"][:, i : i + 1], encoded["zero"][:, i : i + 1]
        expected = scale * ((group - zero) / scale.clamp(min=1e-30)).round().clamp(0, 15) + zero
        assert torch.allclose(mine, expected, rtol=0, atol=1e-7)
        low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
        step = (high - low) / 15
        nearest = step * ((group - low) / step.clamp(min=1e-30)).round() + low
        errors = (mine - group).square().sum(1), (nearest - group).square().sum(1)
        varied = (high > low).squeeze(1)
        assert (errors[0] <= errors[1])[varied].all() and errors[0][varied].sum() < 0.95 * errors[1][varied].sum()


def test_nf4_values_are_those_of_the_paper():
    """They are the quantiles of the normal distribution that appendix E lists; zero is one of them."""
    listed = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    assert torch.allclose(torch.tensor(formats.NF4.VALUES), torch.tensor(listed), rtol=0, atol=1e-6)


def nearest_values(w: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    values = torch.tensor(formats.NF4.VALUES)
    parts = []
    for group, m in zip(groups_of(w), absmax.T, strict=True):
        scaled = group / m.clamp(min=1e-30).unsqueeze(1)
        parts.append(values[(scaled.unsqueeze(-1) - values).abs().argmin(-1)] * m.unsqueeze(1))
    return torch.cat(parts, dim=1)


def test_nf4_is_the_nearest_value_times_the_blocks_absmax():
    w = weight()
    absmax = torch.stack([group.abs().amax(1) for group in groups_of(w)], dim=1)
    assert torch.equal(formats.encode(w, "nf4", torch.bfloat16)["absmax"], absmax)
    assert torch.allclose(there_and_back(w, "nf4"), nearest_values(w, absmax), rtol=0, atol=1e-7)


def test_double_quantization_of_the_absmax():
    """Blocks of 256 have 8 bits each after their mean is taken off, and are off by half a step at most."""
    w = weight(rows=150)
    plain, double = formats.encode(w, "nf4", torch.float32), formats.encode(w, "nf4-dq", torch.float32)
    absmax = plain["absmax"].flatten()
    assert double["absmax"].dtype == torch.int8 and torch.equal(plain["weight"], double["weight"])
    assert torch.allclose(double["absmax_mean"], absmax.mean())
    actual = formats.FORMATS["nf4-dq"].unpack(double)["absmax"].flatten()
    blocks = (absmax - absmax.mean()).split(256)
    steps = torch.stack([block.abs().max() / 127 for block in blocks])
    assert len(blocks) == 3 and torch.allclose(double["absmax_scale"], steps)
    steps = steps.repeat_interleave(256)[: len(absmax)]
    assert ((actual - absmax).abs() <= steps * 0.501).all() and not torch.equal(actual, absmax)


@pytest.mark.skipif(not ops.available(), reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [64, 100, 200])
@pytest.mark.parametrize("name", FORMATS)
def test_our_kernels_give_the_same_as_the_formulas(name, columns, dtype):
    w = weight(rows=37, columns=columns)
    actual = there_and_back(w, name, dtype)
    with use_policy(cpp=False):
        assert torch.equal(actual, there_and_back(w, name, dtype))


@pytest.mark.parametrize("name", FORMATS)
def test_scales_in_float16(name):
    """A model that is loaded in float16 has them; no kernel takes them."""
    tensors = formats.encode(weight(), name, torch.float16)
    actual = formats.decode(tensors, name, 200, torch.float32)
    with use_policy(cpp=False):
        assert torch.equal(actual, formats.decode(tensors, name, 200, torch.float32))


@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4.5), ("nf4", 4.5), ("nf4-dq", 4.127)])
def test_bits_per_weight(name, bits):
    with torch.device("meta"):
        layer = modules.QuantizedLinear(nn.Linear(1024, 4096, bias=False, dtype=torch.bfloat16), name)
    held = 8 * sum(p.nbytes for p in layer.parameters()) / (1024 * 4096)
    assert held == pytest.approx(bits, abs=0.02)


@pytest.mark.parametrize("name", FORMATS)
def test_whatever_the_precision_the_weights_are_the_same(name):
    """What is stored beside codes loses nothing in bfloat16, or is kept in float32."""
    w = weight(dtype=torch.bfloat16)
    narrow, wide = (formats.encode(w, name, dtype) for dtype in (torch.bfloat16, torch.float32))
    exact = formats.decode(wide, name, w.size(1), torch.float32)
    assert torch.equal(formats.decode(narrow, name, w.size(1), torch.float32), exact)
    assert torch.equal(formats.decode(narrow, name, w.size(1), torch.bfloat16), exact.bfloat16())  # rounded once


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_the_backward_pass_is_autograds_through_the_dequantized_weight(name, dtype):
    linear = nn.Linear(200, 30, dtype=dtype)
    linear.weight.data.copy_(weight())
    layer = modules.QuantizedLinear(linear, name)
    x = torch.randn(2, 5, 200, dtype=dtype, requires_grad=True)
    y = layer(x)
    expected = F.linear(x, layer.dequantize(dtype), linear.bias.detach())
    assert torch.equal(y, expected)
    grad = torch.randn_like(y)
    (mine,), (theirs,) = torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, x, grad)
    assert off(mine.float(), theirs.float()) < (1e-12 if dtype == torch.float64 else 1e-2)


def test_the_backward_pass_keeps_no_dequantized_weight():
    layer = modules.QuantizedLinear(nn.Linear(512, 512, bias=False), "nf4")
    x = torch.randn(8, 512, requires_grad=True)
    with MemoryTracker() as live:
        y = layer(x)
        assert live.now <= y.nbytes + sum(p.nbytes for p in layer.parameters())
        assert live.peak >= live.now + 4 * 512 * 512


def test_a_head_that_is_used_piece_by_piece_is_dequantized_once(monkeypatch):
    layer = modules.QuantizedLinear(nn.Linear(64, 96, bias=False), "int8")
    hidden, labels = torch.randn(40, 64, requires_grad=True), torch.randint(96, (40,))
    count, decode = [], modules.decode
    monkeypatch.setattr(modules, "decode", lambda *args: count.append(1) or decode(*args))
    monkeypatch.setattr("lit_gpt.model.loss.MAX_LOGITS", 960)  # 10 tokens
    summed_cross_entropy(layer, hidden, labels).backward()
    assert len(count) == 1 and layer.dequantized_cache is None
    with torch.no_grad():
        summed_cross_entropy(layer, hidden, labels)
    assert len(count) == 2
