"""Shifted sparse attention of LongLoRA: against masks in float64, over families, and from training to dense answers."""

from dataclasses import replace

import pytest
import torch

from helpers.compare import off
from helpers.methods import as_if_trained, attach_fresh
from helpers.runs import planner_of
from helpers.steps import random_row
from helpers.tiny_models import model_of
from lit_gpt.errors import UsageError
from lit_gpt.families.registry import config_from_name
from lit_gpt.kernels.attention import ScoreParams
from lit_gpt.model.packed_inputs import Segments
from lit_gpt.model.sdpa import attend_in_groups

LENGTHS = (9, 31, 5, 1)


def by_masks(q, k, v, scores, size, sinks=None):
    """Return attention in float64 over all pairs of one sample, group and head that are not later."""
    q, k, v = (x.double()[0] for x in (q, k, v))
    groups, heads = len(k), len(q)
    unshifted = -(-heads // 2) if groups == 1 else -(-groups // 2) * heads // groups
    sample = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    place = torch.cat([torch.arange(n) for n in LENGTHS])
    outputs = []
    for head in range(heads):
        first = size if head < unshifted else size // 2
        group = (place - first + size) // size
        behind = place[:, None] - place
        seen = (sample[:, None] == sample) & (group[:, None] == group) & (behind >= 0)
        seen &= behind < (scores.window or sum(LENGTHS))
        logits = q[head] @ k[head * groups // heads].T * scores.scale
        logits = logits if scores.softcap is None else scores.softcap * torch.tanh(logits / scores.softcap)
        logits = logits.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            logits = torch.cat([logits, sinks[head].double().expand(len(logits), 1)], dim=1)
        outputs.append(logits.softmax(-1)[:, : len(place)] @ v[head * groups // heads])
    return torch.stack(outputs).unsqueeze(0)


@pytest.mark.parametrize("size", [2, 7, 8, 64])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (9, 3), (3, 1), (1, 1)])
def test_attention_in_groups_follows_its_masks_in_float64(heads, groups, size):
    """With its gradients; a window, a soft cap and sinks hold within the groups."""
    torch.manual_seed(0)
    rest = [ScoreParams(0.3), ScoreParams(0.3, window=5), ScoreParams(0.3, softcap=2.0)]
    for scores, sinks in [(s, None) for s in rest] + [(rest[0], torch.randn(heads))]:
        q, k, v = (torch.randn(1, n, sum(LENGTHS), 16, requires_grad=True) for n in (heads, groups, groups))
        found = attend_in_groups(q, k, v, scores, Segments.of(LENGTHS), size, sinks)
        wanted = by_masks(q, k, v, scores, size, sinks)
        assert off(found.double(), wanted) < 1e-6
        weights = torch.randn_like(found)
        ours, theirs = (torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (found, wanted))
        for a, b in zip(ours, theirs, strict=True):
            assert off(a, b) < 1e-5


# Rotary and grouped; one key for all; learned positions; ALiBi; windows, soft caps and norms; sinks.
LAYOUTS = [
    ("llama", "llama3"), ("falcon", "7b"), ("gpt2", "gpt2"), ("mpt", "mpt"), ("gemma", "gemma2"),
    ("gpt_oss", "gpt_oss"),
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
def test_samples_of_a_row_do_not_see_each_other_and_evaluation_is_dense(tmp_path, layout):
    model = as_if_trained(attach_fresh(model_of(*layout, tmp_path), "LoRA"))
    row, at = random_row(), 0
    dense = model(row.idx, segments=row.segments)
    model.attend_in_groups(8)
    assert torch.equal(model(row.idx, segments=row.segments), dense)
    packed = model.train()(row.idx, segments=row.segments)
    for length in row.segments.lengths:
        alone = model(row.idx[:, at : at + length])
        assert off(packed[:, at : at + length], alone) < 1e-5
        at += length
    start = sum(row.segments.lengths[:1])
    assert off(packed[:, start : start + 4], dense[:, start : start + 4]) < 1e-5  # before any group ends
    assert off(packed, dense) > 1e-3
    model.attend_in_groups(128)
    assert off(model(row.idx, segments=row.segments), dense) < 1e-5


def test_layers_without_attention_are_refused(tmp_path):
    with pytest.raises(UsageError, match="--attention_group 8: .* has layers without attention"):
        model_of("qwen3_next", "qwen3_next", tmp_path / "a").attend_in_groups(8)
    with pytest.raises(UsageError, match="--attention_group 1: expected at least 2"):
        model_of("llama", "llama3", tmp_path / "b").attend_in_groups(1)


@pytest.mark.slow
def test_the_plan_counts_groups():
    config = replace(config_from_name("pythia-70m"), n_layer=2)
    plans = [
        planner_of(config, "lora", **group).plan(([1024], 1024), "none") for group in ({}, {"attention_group": 128})
    ]
    assert plans[1].trainable == plans[0].trainable and plans[1].peak <= 1.05 * plans[0].peak


def test_what_groups_do_not_go_with_is_refused(cli, flags):
    """A run in groups is that of tests/conversion/test_extension.py."""
    flags = {k: v for k, v in flags.items() if not k.startswith("lora")}
    cli("finetune/prompt.py", **flags, attention_group=16).refused("--attention_group 16", "learned prompt", code=2)
    cli("finetune/full.py", **flags, attention_group=0).refused("--attention_group", "above 0", code=2)
