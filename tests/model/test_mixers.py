"""Token mixers besides attention: the same in chunks as token by token, and nothing passes between packed samples."""

import copy

import pytest
import torch
import torch.nn.functional as F

from helpers.compare import off
from helpers.tiny_models import LAYOUTS, model_of
from lit_gpt import GPT
from lit_gpt.errors import UsageError
from lit_gpt.families.registry import config_from_hf, families
from lit_gpt.generation.engine import generate
from lit_gpt.generation.steps import FastStep
from lit_gpt.methods import adapter_v2, lora
from lit_gpt.model.gpt import quantize
from lit_gpt.model.kv_cache import truncate
from lit_gpt.model.mixers import latent, mamba, recurrence
from lit_gpt.model.packed_inputs import Segments

FAMILIES = {family.__name__.rpartition(".")[2]: family for family in families()}
STATELESS = {"attention", "latent_attention"}
RECURRENT = [(f, x) for f, x in LAYOUTS if {*config_from_hf(FAMILIES[f].tiny_hf()[x].to_dict()).mixers} - STATELESS]


@pytest.fixture(scope="module", params=RECURRENT, ids="-".join)
def hybrid(request, tmp_path_factory) -> GPT:
    """A tiny model of each layout in which a layer mixes tokens by something else than attention."""
    return model_of(*request.param, tmp_path_factory.mktemp("hybrid"))


def inputs(T: int, groups: int, heads: int, delta: bool) -> list[torch.Tensor | None]:
    g = torch.Generator().manual_seed(T)
    q, k = (torch.randn(2, T, groups, 6, generator=g) for _ in "qk")
    v, decay = torch.randn(2, T, heads, 5, generator=g), -3 * torch.rand(2, T, heads, generator=g)
    rate = torch.rand(2, T, heads, generator=g) if delta else None
    return [q, F.normalize(k, dim=-1), v, decay, rate, torch.randn(2, heads, 6, 5, generator=g)]


@pytest.mark.parametrize("delta", [True, False], ids=["delta rule", "plain"])
@pytest.mark.parametrize("heads", [(1, 3), (2, 4), (3, 3)])
def test_chunks_equal_tokens(heads, delta):
    """At lengths that divide evenly into chunks and not, with gradients."""
    for T in (1, 2, 63, 64, 65, 128, 200, 300):
        given = [x if x is None else x.requires_grad_() for x in inputs(T, *heads, delta)]
        leaves = [x for x in given if x is not None]
        results = [f(*given) for f in (recurrence.by_chunk, recurrence.by_token)]
        for found, expected in zip(*results, strict=True):
            assert off(found.detach(), expected.detach()) < 1e-5
        if T in (2, 65, 128):
            grads = [torch.autograd.grad((y.sin().sum() + s.cos().sum()), leaves) for y, s in results]
            assert all(off(a, b) < 1e-5 for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("T", [1, 2, 9, 60, 300])
def test_mambas_chunks_equal_tokens(T):
    g = torch.Generator().manual_seed(T)
    q, k = (torch.randn(2, T, 3, generator=g) for _ in "qk")
    v, step = torch.randn(2, T, 4, generator=g), torch.rand(2, T, 4, generator=g)
    A, state = -torch.rand(4, 3, generator=g), torch.randn(2, 4, 3, generator=g)
    leaves = [x.requires_grad_() for x in (q, k, v, step, A, state)]
    found, (outputs, carried) = mamba.scan(*leaves), ([], state)
    for t in range(T):
        carried = (step[:, t, :, None] * A).exp() * carried + (step * v)[:, t, :, None] * k[:, t, None]
        outputs.append((carried * q[:, t, None]).sum(-1))
    expected = torch.stack(outputs, 1), carried
    assert all(off(a.detach(), b.detach()) < 1e-5 for a, b in zip(found, expected, strict=True))
    grads = [torch.autograd.grad(y.sin().sum() + s.cos().sum(), leaves) for y, s in (found, expected)]
    assert all(off(a, b) < 1e-5 for a, b in zip(*grads, strict=True))


def run(model: GPT, tokens: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return logits and gradients of the embedded tokens, sample by sample, of samples packed into one row."""
    lengths, seen = [len(t) for t in tokens], []
    hook = model.wte.register_forward_hook(lambda _, __, y: seen.append(y.detach().requires_grad_()) or seen[0])
    logits = model(torch.cat(tokens)[None], segments=Segments.of(lengths))
    hook.remove()
    logits.sin().sum().backward()
    return list(logits.detach().split(lengths, 1)), list(seen[0].grad.split(lengths, 1))


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_no_sample_changes_another(hybrid: GPT, changed: int):
    """Bit by bit, across the boundaries of chunks and within, logits and gradients."""
    hybrid.requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    tokens = [torch.randint(96, (n,), generator=g) for n in (3, 90, 1, 50)]
    others = [torch.randint(96, (len(t),), generator=g) if i == changed else t for i, t in enumerate(tokens)]
    for before, after in zip(run(hybrid, tokens), run(hybrid, others), strict=True):
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert same == [i != changed for i in range(len(tokens))]


@torch.no_grad()
def test_packed_equals_alone(hybrid: GPT):
    tokens = [torch.randint(96, (n,)) for n in (64, 1, 70, 2, 9)]
    packed = hybrid(torch.cat(tokens)[None], segments=Segments.of([len(t) for t in tokens]))
    for found, alone in zip(packed.split([len(t) for t in tokens], 1), tokens, strict=True):
        assert off(found, hybrid(alone[None])) < 1e-5


@torch.no_grad()
def test_a_state_goes_back_to_nothing_but_its_start(hybrid: GPT):
    """What is asked for and cannot be had is read again; a cache that was used is as good as a new one."""
    prompt = list(range(20))
    expected = list(generate(hybrid, prompt, 5, temperature=0))
    cache = hybrid.kv_cache(1, 30)
    for _ in range(2):
        truncate(cache, 19)
        assert list(generate(hybrid, prompt, 5, temperature=0, cache=cache, step=FastStep(hybrid))) == expected
    assert cache[0].length == 24
    truncate(cache, 24)
    assert cache[0].length == 24
    truncate(cache, 23)
    assert {layer.length for layer in cache} == {0}


def test_compiling_a_recurrence_is_refused(hybrid: GPT):
    with pytest.raises(UsageError, match="--compile true: .* cannot be compiled"):
        FastStep(hybrid, compile=True)


@torch.no_grad()
def test_qlora_on_a_recurrence(hybrid: GPT):
    """Attached to a base in 4 bits it changes nothing at first; trained, it does, by projections of every layer."""
    if hybrid.config.n_expert:
        return  # which are not quantized
    model, idx = quantize(copy.deepcopy(hybrid), "nf4"), torch.arange(3, 40)[None]
    expected = model(idx)
    config = lora.LoRAConfig(r=2, alpha=4, dropout=0.0, key=True, projection=True)
    assert torch.equal(lora.attach(model, config)(idx), expected)
    layers = lora.lora_layers(model)
    mixers = {f"h.{i}.{name}" for i, block in enumerate(hybrid.h) for name in block.token_mixers}
    assert layers.keys() == {f"{mixer}.{part}" for mixer in mixers for part in ("qkv", "proj")}
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    changed = model(idx)
    assert off(changed, expected) > 1e-2
    assert off(lora.merge(model)(idx), changed) < 1e-5


@torch.no_grad()
def test_latent_attention_caches_latents_and_one_key(tmp_path):
    """And attends to them as they are, or, where a method has wrapped what makes keys and values of them, to those."""
    model, idx = model_of("deepseek", "deepseek_v3", tmp_path), torch.arange(3, 20)[None]
    for wrapped in (False, True):
        if wrapped:
            adapter_v2.attach(model, adapter_v2.AdapterConfig(start_layer=1))
            torch.nn.init.normal_(model.h[1].mixer.kv_up.shift, std=0.1)
        cache = model.kv_cache(1, 20)
        assert [x.shape for x in (cache[0].k, cache[0].v)] == [(1, 1, 20, 8), (1, 1, 20, 16)]
        found = torch.cat([model(step, cache=cache) for step in idx.split([10, *[1] * 7], 1)], dim=1)
        assert off(found, model(idx)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("update", ["plain", "dora"])
def test_latents_are_attended_to_by_a_weight_with_its_updates(tmp_path, monkeypatch, update):
    """Beyond a length; the keys and values of all tokens are made up to it."""
    model, idx = model_of("deepseek", "deepseek_v3", tmp_path), torch.arange(3, 20)[None]
    lora.attach(model, lora.LoRAConfig(r=4, update=update)).eval()
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    for length in (0, 14):
        monkeypatch.setattr(latent, "WHOLE_LENGTH", length)
        cache = model.kv_cache(1, 20)
        found = torch.cat([model(step, cache=cache) for step in idx.split([10, *[1] * 7], 1)], dim=1)
        assert off(found, model(idx)) < 1e-5
