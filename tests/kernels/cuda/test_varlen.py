"""Flash attention of packed samples gets views, and keys that heads share, from releases that take such."""

import pytest
import torch
import torch.nn.attention.varlen as varlen
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.compare import off
from lit_gpt.kernels.attention import ScoreParams
from lit_gpt.kernels.attention import attention as blockwise
from lit_gpt.kernels.policy import use_policy
from lit_gpt.model import sdpa
from lit_gpt.model.packed_inputs import Segments

LENGTHS = (5, 1, 9)


def grouped(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False) -> Tensor:
    """What torch 2.13 has."""
    assert (q.size(1) == k.size(1)) != enable_gqa and window_size[1] == 0 and max_q == max(LENGTHS)
    assert all(x.untyped_storage().data_ptr() == q.untyped_storage().data_ptr() for x in (q, k, v))  # none is a copy
    scores = ScoreParams(scale, None if window_size[0] < 0 else window_size[0] + 1)
    heads = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return blockwise(*heads, scores, tuple(cu_q.diff().tolist())).squeeze(0).transpose(0, 1)


def equal_heads(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size) -> Tensor:
    """What torch 2.11 has."""
    assert q.size(1) == k.size(1) == v.size(1)
    scores = ScoreParams(scale, None if window_size[0] < 0 else window_size[0] + 1)
    heads = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return blockwise(*heads, scores, tuple(cu_q.diff().tolist())).squeeze(0).transpose(0, 1)


def heads_of(qkv: Tensor, groups: int) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in qkv.view(1, -1, 6 + 2 * groups, 8).split([6, groups, groups], dim=2))


@pytest.mark.parametrize("release", [grouped, equal_heads])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("window", [None, 3])
def test_each_release_gets_what_it_takes(release, groups, window, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", release)
    heads = heads_of(torch.randn(1, sum(LENGTHS), (6 + 2 * groups) * 8), groups)
    scores, segments = ScoreParams(0.3, window), Segments.of(LENGTHS)
    found = sdpa.attend_varlen(*heads, scores, segments)
    assert found.shape == heads[0].shape and off(found, blockwise(*heads, scores, LENGTHS)) < 1e-5


@pytest.mark.parametrize("groups", [1, 6])
def test_torch_takes_them(groups):
    """As far as shapes go, forward and backward; with contents it runs on CUDA alone."""
    with FakeTensorMode(), use_policy(contents=False):
        qkv = torch.empty(1, sum(LENGTHS), (6 + 2 * groups) * 8, dtype=torch.bfloat16, requires_grad=True)
        heads = heads_of(qkv, groups)
        assert sdpa.flash_supports(heads[0])
        y = sdpa.attend_packed(*heads, ScoreParams(0.3), Segments.of(LENGTHS))
        y.sum().backward()
        assert y.shape == heads[0].shape and qkv.grad.shape == qkv.shape
