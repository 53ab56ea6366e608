"""Attention of a new token of each row against float64: rotation, cache, groups, windows, ragged positions."""

import pytest
import torch
from torch import Tensor

from lit_gpt.kernels.cuda.decoding import attention
from lit_gpt.kernels.cuda.decoding.attention import Heads, attend
from lit_gpt.kernels.cuda.gemv import counters

ROOM = 300


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def turned(x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotate heads (rows, heads, size)."""
    if rotation is None:
        return x
    c, s = (t.double().unsqueeze(1) for t in rotation)
    n = c.size(-1)
    low, high, rest = x.split((n, n, x.size(-1) - 2 * n), -1)
    return torch.cat((low * c - high * s, high * c + low * s, rest), -1)


def expected(qkv: Tensor, k: Tensor, v: Tensor, positions: list[int], heads: Heads) -> Tensor:
    """Compute in float64 what the kernel does, row by row; k and v get the new token."""
    parts = qkv.double().unflatten(1, (-1, heads.size)).split((heads.n, heads.groups, heads.groups), 1)
    q, new_k, new_v = turned(parts[0], heads.rotation), turned(parts[1], heads.rotation), parts[2]
    made = []
    for row, at in enumerate(positions):
        k[row, :, at], v[row, :, at] = new_k[row].to(k.dtype), new_v[row].to(v.dtype)
        first = max(0, at + 1 - heads.window) if heads.window else 0
        keys, values = (x[row, :, first : at + 1].double() for x in (k, v))
        keys, values = (x.repeat_interleave(heads.n // heads.groups, 0) for x in (keys, values))
        scores = (q[row].unsqueeze(1) * keys).sum(-1) * heads.scale
        if heads.slopes is not None:
            scores = scores + heads.slopes.double().unsqueeze(1) * torch.arange(first, at + 1)
        if heads.softcap:
            scores = heads.softcap * torch.tanh(scores / heads.softcap)
        made.append((scores.softmax(-1).unsqueeze(-1) * values).sum(1).flatten())
    return torch.stack(made)


CASES = {
    "falcon": Heads(n=19, groups=1, size=64, scale=0.125),
    "grouped, window": Heads(n=8, groups=2, size=40, scale=0.2, window=70),
    "soft cap": Heads(n=3, groups=3, size=16, scale=0.3, softcap=5.0),
    "slopes": Heads(n=4, groups=4, size=24, scale=0.2, slopes=-random(4, seed=9).abs() / 8),
}


@pytest.mark.parametrize("longest", [64, 512])
@pytest.mark.parametrize("pairs", [0, 6])
@pytest.mark.parametrize("name", CASES)
def test_each_row_attends_to_its_own_places_and_stores_its_token(name, pairs, longest):
    positions = [0, 63, 64, 299]
    rotation = (random(4, pairs, seed=4), random(4, pairs, seed=5)) if pairs else None
    heads = Heads(**{**vars(CASES[name]), "rotation": rotation})
    qkv = random(4, (heads.n + 2 * heads.groups) * heads.size)
    cache = [random(4, heads.groups, ROOM, heads.size, seed=seed) for seed in (1, 2)]
    for kept in cache:
        for row, at in enumerate(positions):
            kept[row, :, at:] = torch.nan  # what is not written yet must not be read
    exact = [kept.clone() for kept in cache]
    pointers = torch.tensor([kept.data_ptr() for kept in cache])
    y = torch.full((4, heads.n * heads.size), torch.nan)
    attend(qkv, y, torch.tensor(positions), pointers, torch.tensor([ROOM]), heads, torch.float32, longest)
    torch.testing.assert_close(y.double(), expected(qkv, *exact, positions, heads), rtol=1e-5, atol=1e-5)
    for kept, theirs in zip(cache, exact, strict=True):
        torch.testing.assert_close(kept, theirs, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert not counters(y).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cache_in_16_bits(dtype):
    heads, positions = Heads(n=4, groups=2, size=32, scale=0.2), [100, 7]
    qkv = random(2, 8 * 32)
    cache = [random(2, 2, ROOM, 32, seed=seed).to(dtype) for seed in (1, 2)]
    exact, y = [kept.clone() for kept in cache], torch.empty(2, 4 * 32)
    pointers = torch.tensor([kept.data_ptr() for kept in cache])
    attend(qkv, y, torch.tensor(positions), pointers, torch.tensor([ROOM]), heads, dtype, 256)
    found = expected(qkv, *exact, positions, heads)
    assert (y - found).norm() / found.norm() < (6e-3 if dtype == torch.bfloat16 else 1e-3)


def test_a_row_without_a_token_stores_nothing():
    heads, cache = Heads(n=2, groups=1, size=16, scale=0.2), [torch.zeros(2, 1, 8, 16) for _ in "kv"]
    pointers, y = torch.tensor([kept.data_ptr() for kept in cache]), torch.empty(2, 32)
    attend(random(2, 64), y, torch.tensor([-1, 3]), pointers, torch.tensor([8]), heads, torch.float32, 64)
    assert not any(kept[0].any() for kept in cache) and all(kept[1, :, 3].any() for kept in cache)


@pytest.mark.parametrize("pairs", [0, 6])
def test_a_prefix_adds_what_is_found_in_it(pairs):
    rotation = (random(3, pairs, seed=4), random(3, pairs, seed=5)) if pairs else None
    heads = Heads(n=4, groups=2, size=24, scale=0.2, rotation=rotation)
    qkv, y, gate = random(3, 8 * 24), random(3, 4 * 24, seed=1), random(4, seed=2)
    k, v = random(2, 10, 24, seed=6), random(2, 10, 24, seed=7)
    q = turned(qkv.double().unflatten(1, (-1, 24))[:, :4], rotation)
    keys, values = (x.double().repeat_interleave(2, 0) for x in (k, v))
    weights = ((q.unsqueeze(2) * keys).sum(-1) * 0.2).softmax(-1)
    found = y.double() + ((weights.unsqueeze(-1) * values).sum(2) * gate.double()[:, None]).flatten(1)
    attention.attend_prefix(qkv, y, 3, k, v, 10, gate, heads)
    torch.testing.assert_close(y.double(), found, rtol=1e-5, atol=1e-5)
