"""Training steps by operations with gradients of their own: the same gradients, and what is kept for them."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from helpers.compare import off
from helpers.steps import random_row, step
from helpers.tiny_models import Tiny
from lit_gpt import GPT
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.families.registry import config_from_name
from lit_gpt.kernels import attention, ops
from lit_gpt.kernels.attention import ScoreParams
from lit_gpt.methods import adapter_v2, lora
from lit_gpt.methods.adapter import AdapterConfig
from lit_gpt.model import packed_inputs as inputs_module
from lit_gpt.model.packed_inputs import Targets
from lit_gpt.training.memory import activation_checkpointing
from lit_gpt.training.memory.activation_checkpointing import KINDS, apply_activation_checkpointing
from lit_gpt.training.memory.offloading import Offloader

NARROW = torch.bfloat16
ALL = lora.LoRAConfig(r=4, dropout=0.1, key=True, projection=True, mlp=True, head=True)


def test_steps_are_deterministic_and_keeping_less_changes_nothing(tiny: Tiny):
    torch.manual_seed(0)
    gpt, row = lora.attach(load_model(tiny.folder), ALL), random_row()
    for layer in lora.lora_layers(gpt).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    first = step(gpt, row)
    assert all(torch.equal(a, b) for a, b in zip(first, step(gpt, row), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, step(gpt, row, seed=1), strict=True))
    plain = [block.forward for block in gpt.h]
    for kind in KINDS:
        apply_activation_checkpointing(gpt, kind)
        assert all(torch.equal(a, b) for a, b in zip(first, step(gpt, row), strict=True)), kind
        if kind != "selective":  # that stays, for its parts are of other modules
            for block, forward in zip(gpt.h, plain, strict=True):
                block.forward = forward


@pytest.mark.parametrize("method", ["adapter_v2", "full"])
def test_keeping_less_changes_nothing_for_other_methods(tiny: Tiny, method):
    """This holds in bfloat16 over float32 weights too."""
    row = random_row()
    for kind in KINDS[1:]:
        torch.manual_seed(0)
        gpt = load_model(tiny.folder)
        gpt = adapter_v2.attach(gpt, AdapterConfig(start_layer=1)) if method == "adapter_v2" else gpt.requires_grad_()
        for arithmetic in (nullcontext(), torch.autocast("cpu", NARROW, cache_enabled=False)):
            with arithmetic:
                first = step(gpt, row)
        apply_activation_checkpointing(gpt, kind)
        with arithmetic:
            assert all(torch.equal(a, b) for a, b in zip(first, step(gpt, row), strict=True)), kind


def test_what_is_offloaded_is_the_blocks_inputs(tiny: Tiny, monkeypatch):
    torch.manual_seed(0)
    gpt, row, moved = lora.attach(load_model(tiny.folder), ALL), random_row(), []
    pack = Offloader.pack
    monkeypatch.setattr(Offloader, "pack", lambda self, x: moved.append(x.shape) or pack(self, x))
    apply_activation_checkpointing(gpt, "offload")
    step(gpt, row)
    streams = [gpt.config.n_stream] if gpt.config.n_stream > 1 else []
    assert moved == [(*streams, 1, row.idx.numel(), gpt.config.n_embd)] * gpt.config.n_layer


@pytest.mark.skipif(not ops.available(), reason="no C++ compiler")
@pytest.mark.parametrize("name", ["SmolLM2-135M", "gemma-2b", "Qwen3-0.6B"])
def test_a_step_with_kernels_has_the_gradients_of_one_without(name, monkeypatch):
    """They are the same in float32, and in bfloat16 at most as far from float32's as the plain path's."""
    small = dict(n_layer=2, padded_vocab_size=96, n_embd=128, intermediate_size=192)
    torch.manual_seed(0)
    gpt = lora.attach(GPT(config_from_name(name, **small)), replace(ALL, dropout=0.0))
    for layer in lora.lora_layers(gpt).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    row, ways = random_row((9, 131, 5)), {}
    for dtype in (torch.float32, NARROW):
        for parameter in gpt.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        for there in (True, False):
            monkeypatch.setattr(ops, "available", lambda there=there: there)
            ways[dtype, there] = step(gpt, row)
    exact = ways[torch.float32, False]
    for actual, expected in zip(ways[torch.float32, True], exact, strict=True):
        assert off(actual, expected) < 1e-5
    ours, plain = ([off(*pair) for pair in zip(ways[NARROW, there], exact, strict=True)] for there in (True, False))
    assert sum(ours) <= 1.1 * sum(plain) and max(ours) <= 1.2 * max(plain)


@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_a_step_without_contents(kind, with_kernels):
    """Memory is predicted by such steps."""
    mode = FakeTensorMode() if kind == "fake" else torch.device("meta")
    row = random_row()
    with mode:
        gpt = lora.attach(GPT(config_from_name("SmolLM2-135M", n_layer=2)), ALL)
        idx, at, labels, offsets, positions, numbers = (
            torch.empty(x.shape, dtype=x.dtype)
            for x in (row.idx, row.targets.positions, row.targets.labels, row.segments.offsets, row.segments.positions,
                      row.segments.samples)
        )  # fmt: skip
        segments = inputs_module.Segments(row.segments.lengths, offsets, positions, numbers)
        gpt.train()(idx, segments=segments, targets=Targets(at, labels)).backward()
    assert all(p.grad.shape == p.shape for p in gpt.parameters() if p.requires_grad)


@pytest.mark.parametrize("spare", ["none", "selective"])
def test_a_block_keeps_what_it_must(with_kernels, spare, monkeypatch):
    """Count by hand the bytes per token that a block of Llama's kind with LoRA keeps for the backward pass."""
    config = config_from_name("SmolLM2-135M", n_layer=2)
    gpt, row = lora.attach(GPT(config).bfloat16(), lora.LoRAConfig(key=True, projection=True, mlp=True)), random_row()
    kept: dict[int, int] = {}

    def note(saved: Tensor | activation_checkpointing.Recompute) -> Tensor | activation_checkpointing.Recompute:
        storage = (saved.x if isinstance(saved, activation_checkpointing.Recompute) else saved).untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return saved

    pack = activation_checkpointing.RecomputedOutputs.pack
    monkeypatch.setattr(
        activation_checkpointing.RecomputedOutputs, "pack", lambda self, tensor: note(pack(self, tensor))
    )
    apply_activation_checkpointing(gpt, spare)
    x = torch.randn(1, row.idx.size(1), config.n_embd).bfloat16().requires_grad_()
    rotation = gpt.rope(row.segments.positions, row.segments.lengths, x.dtype)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        gpt.train().h[0](x, rotation, row.segments, None)
    weights = {p.untyped_storage().data_ptr() for p in gpt.parameters()}
    actual = sum(size for pointer, size in kept.items() if pointer not in weights) / row.idx.numel()
    n, inner, qkv, r = config.n_embd, config.intermediate_size, sum(config.qkv_sizes), 8
    elements = (
        2 * n + 2 * n + qkv + n + 3 * inner
    )  # norms, what they give, q k v, what attention gives, gate up and product
    elements -= 2 * n + inner if spare == "selective" else 0
    masks, low, rest = (3 * n + inner) / 8, 7 * r * 2, 2 * 4 + 4 * config.head_size
    if with_kernels:  # a seed for a mask, and of the probabilities each query's sum
        masks, low, rest = 0, 7 * r * 4, rest + 4 * config.n_head
    blocks = attention._blocks(row.segments.lengths, ScoreParams(1.0))
    probabilities = 2 * config.n_head * sum((b.end - b.begin) * (b.end - b.first) for b in blocks) / row.idx.numel()
    probabilities = 0 if with_kernels else probabilities
    assert actual < 1.01 * (2 * elements + masks + low + rest + probabilities)
