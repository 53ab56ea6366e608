"""The memory plan counts what the training step really holds, and scripts/plan.py tells it."""

import json
from dataclasses import astuple, replace

import pytest
import torch

from helpers.runs import planner_of
from lit_gpt import GPT
from lit_gpt.distributed.args import DeviceArgs
from lit_gpt.families.registry import config_from_name
from lit_gpt.model.packed_inputs import Segments, Targets
from lit_gpt.training.memory.activation_checkpointing import KINDS, apply_activation_checkpointing
from lit_gpt.training.memory.tracker import MemoryTracker

METHODS = ("lora", "adapter", "adapter_v2", "full")
SMALL = replace(
    config_from_name("falcon-7b"), n_layer=7, n_head=4, n_embd=64, n_query_groups=2, head_size=16,
    intermediate_size=128, vocab_size=300, padded_vocab_size=300,
)  # fmt: skip
ROW = [40, 30, 20]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_few_layers_tell_of_many(method, kind):
    planner = planner_of(SMALL, method, cuda=True)
    few, all_layers = planner.plan((ROW, 50), kind), planner.simulate(SMALL, (ROW, 50), kind)
    assert astuple(few)[:-1] == pytest.approx(astuple(all_layers)[:-1], rel=0.002)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("method", METHODS)
def test_the_step_holds_what_was_planned(method, precision, kind):
    """The same count over a real step's tensors."""
    planner = planner_of(SMALL, method, precision=precision)
    method, found = planner.method, planner.simulate(SMALL, (ROW, 50), kind)
    segments, idx = Segments.of(ROW), torch.randint(300, (1, sum(ROW)))
    targets = Targets(torch.arange(50), torch.randint(300, (50,)))
    with MemoryTracker() as live:
        model = GPT(SMALL)
        model = method.attach(model.to(method.weight_dtype(precision))).train()
        apply_activation_checkpointing(model, kind)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        held = live.now
        live.peak = live.now
        with method.autocast(precision, "cpu"):
            loss = model(idx, segments=segments, targets=targets)
        loss.backward()
        gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
    assert found.weights == pytest.approx(weights, rel=0.01) and found.gradients == gradients
    step = max(found.forward, found.backward_begins, found.backward_ends) - found.weights - found.optimizer
    assert live.peak - held == pytest.approx(step, rel=0.02)


def test_an_A_that_is_frozen_spares_activations_as_planned():
    """LoRA-FA (Zhang et al. 2023, arXiv 2308.03303) keeps no inputs of the layers that it adapts."""
    planned, kept = {}, {}
    for trains in ("both", "B"):
        planner = planner_of(SMALL, "lora", lora_train=trains, lora_key="true", lora_projection="true", lora_mlp="true")
        plan = planner.simulate(SMALL, (ROW, 50), "none")
        planned[trains] = plan.forward - plan.weights - plan.optimizer
        model = planner.method.attach(GPT(SMALL).to(torch.bfloat16)).train()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved: dict[int, torch.UntypedStorage] = {}

        def keep(tensor, weights=weights, saved=saved):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage  # held, so that no other takes its place
            return tensor

        with planner.method.autocast("bf16", "cpu"), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            targets = Targets(torch.arange(50), torch.randint(300, (50,)))
            model(torch.randint(300, (1, sum(ROW))), segments=Segments.of(ROW), targets=targets)
        kept[trains] = sum(storage.nbytes() for storage in saved.values())
    # per token and block at least the normed input and what the MLP's activation gives, in bfloat16
    assert planned["both"] - planned["B"] == kept["both"] - kept["B"] >= 7 * sum(ROW) * 2 * (64 + 128)


def test_the_optimizers_state():
    counts = sum(p.numel() for p in GPT(SMALL).parameters())
    for optimizer, expected in (("adamw", 8), ("sgd", 0)):
        plan = planner_of(SMALL, "full", optimizer=optimizer).plan((ROW, 50), "none")
        assert plan.optimizer == pytest.approx(expected * counts, rel=0.001)
    assert planner_of(SMALL, "full", optimizer_in_backward="true").plan((ROW, 50), "none").gradients == 0


@pytest.mark.parametrize(
    ("method", "trainable"),
    [("lora", 3_506_176), ("adapter", 1_365_330), ("adapter_v2", 3_839_186), ("full", 7_217_189_760)],
)
def test_falcon_7b(cli, method, trainable):
    """Through the finetune scripts' own code, on no device at all."""
    result = cli(
        "scripts/plan.py", model="falcon-7b", method=method, micro_batch_size=1, max_seq_length=64, json="true"
    )
    found = json.loads(result.out)
    assert result.code == 0 and found["trainable"] == trainable
    expected = 4 * 7_217_189_760 if method == "full" else 2 * 7_217_189_760
    assert found["weights"] == pytest.approx(expected, rel=0.002) and found["train"] > found["weights"]


@pytest.mark.parametrize("method", ["lora", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS[1:])])
def test_each_kind_of_checkpointing_holds_less_and_what_fits_is_chosen(method):
    row, planner = ([400] * 3, 50), planner_of(SMALL, method, cuda=True)
    # no layer that an adapter trains reads what norms and gates give, so there is nothing for `selective` to spare
    kinds = [kind for kind in KINDS if kind != "selective" or not method.startswith("adapter")]
    plans = {kind: planner.plan(row, kind) for kind in kinds}
    peaks = [plans[kind].activations for kind in kinds]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) >= 3, peaks
    for kind in kinds:
        chosen = replace(planner, memory=int(1.1 * plans[kind].peak) + 1).choose_settings([row])[0]
        assert plans[chosen].peak == plans[kind].peak
    assert replace(planner, memory=0).choose_settings([row])[0] == "offload"
    assert replace(planner, memory=0, cuda=False).choose_settings([row])[0] == "full"


def test_sharding_over_ranks():
    one = planner_of(SMALL, "full").plan((ROW, 50), "none")
    shared = one.sharded(DeviceArgs(devices=4, strategy="fsdp"))
    assert shared.optimizer == one.optimizer // 4 and shared.weights < one.weights and shared.train < one.train
    shared = one.sharded(DeviceArgs(devices=4, strategy="deepspeed", zero_stage=2))
    assert shared.weights == one.weights and shared.gradients == one.gradients // 4
    assert one.sharded(DeviceArgs(devices=4, strategy="ddp")) == one


def test_what_it_prints(cli):
    result = cli("scripts/plan.py", model="pythia-70m", max_seq_length=128, memory_gb=0.3, lora_r=4)
    assert result.code == 0 and "peak of train" in result.out and "merge_lora" in result.out, result.err
    assert "fits" in result.out and "does not fit" in result.out
    cli("scripts/plan.py", model="falcon-9b").refused("falcon-9b", "falcon-7b", code=2)
    cli("scripts/plan.py", method="nope").refused("--method nope", "lora, adapter", code=2)
    cli("scripts/plan.py", model="falcon-7b", method="full", lora_r=4).refused("unknown flag --lora_r", code=2)
