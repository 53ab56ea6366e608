"""GaLore against its algorithm in float64, and as the optimizer of a run."""

import json
from dataclasses import replace

import pytest
import torch

from helpers.compare import identical, off
from helpers.runs import method_flags, metrics, planner_of, weights_of
from lit_gpt.errors import UsageError
from lit_gpt.families.registry import config_from_name
from lit_gpt.training.args import OptimizationArgs
from lit_gpt.training.optimizers import GaLore, make_optimizer, optimizer_for

SETTINGS = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.05, "rank": 3, "gap": 2, "scale": 0.5}


def by_algorithm(weight, gradients, projects):
    """Return the weight after these gradients, by algorithm 2 of the paper with AdamW's decay."""
    P = M = V = None
    for t, G in enumerate(gradients, 1):
        left = not projects or G.size(-2) <= G.size(-1)
        if projects and (t - 1) % 2 == 0:
            _, vectors = torch.linalg.eigh(G @ G.mT if left else G.mT @ G)  # the largest come last
            P = vectors.flip(-1)[..., :3]
        R = G if not projects else (P.mT @ G if left else G @ P)
        M = 0.2 * R if M is None else 0.8 * M + 0.2 * R
        V = 0.1 * R**2 if V is None else 0.9 * V + 0.1 * R**2
        N = (M / (1 - 0.8**t)) / ((V / (1 - 0.9**t)).sqrt() + 1e-3)
        N = N if not projects else 0.5 * (P @ N if left else N @ P.mT)
        weight = weight - 0.1 * (N + 0.05 * weight)
    return weight


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (2, 8, 5), (3, 12), (9,)], ids=str)
def test_steps_follow_the_algorithm_in_float64(shape, monkeypatch):
    """Tall, wide, of experts, and where nothing is projected. Singular vectors have no sign: both take the same."""
    torch.manual_seed(0)
    start, projects = torch.randn(shape, dtype=torch.float64), len(shape) > 1 and min(shape[-2:]) > 3
    gradients = [torch.randn(shape, dtype=torch.float64) for _ in range(5)]
    svd, eigh = torch.linalg.svd, torch.linalg.eigh

    def positive(vectors):
        return vectors * vectors.sum(-2, keepdim=True).sign()

    def signed_svd(x, full_matrices):
        U, S, Vh = svd(x, full_matrices=full_matrices)
        return positive(U), S, positive(Vh.mT).mT

    monkeypatch.setattr(torch.linalg, "svd", signed_svd)
    monkeypatch.setattr(torch.linalg, "eigh", lambda x: (lambda v, w: (v, positive(w)))(*eigh(x)))
    weight = torch.nn.Parameter(start.clone())
    optimizer = GaLore([{"params": [weight], "projects": len(shape) > 1}], **SETTINGS)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    assert off(weight.detach(), by_algorithm(start, gradients, projects)) < 1e-9
    assert ("subspace" in optimizer.state[weight]) == projects


def test_state_is_of_low_rank_and_the_plan_counts_it():
    config = replace(config_from_name("pythia-70m"), n_layer=2)
    settings = {"optimizer": "galore", "optimizer_args": json.dumps({"rank": 32})}
    plan = planner_of(config, "full", **settings).plan(([64], 64), "none")
    blocks, saved = 2 * 12 * 512**2, 8 * plan.trainable - plan.optimizer  # AdamW has two float32 for each weight
    assert 0.8 * 8 * blocks < saved < 8 * blocks


def test_arguments_are_checked():
    with pytest.raises(UsageError, match="rank is 0, expected a whole number above 0"):
        make_optimizer(
            [torch.nn.Parameter(torch.ones(2))], OptimizationArgs(optimizer="galore", optimizer_args={"rank": 0})
        )


def test_steps_in_the_backward_pass_are_the_same():
    results = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.Linear(7, 8))
        args = OptimizationArgs(optimizer="galore", optimizer_args={"rank": 3}, optimizer_in_backward=in_backward)
        parameters = [{"params": [p], "projects": p.ndim > 1} for p in model.parameters()]
        optimizer = optimizer_for(parameters, args)
        for _ in range(3):
            model(torch.ones(2, 9)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model.state_dict())
        kinds = [group["projects"] for group in optimizer.state_dict()["param_groups"]]
        assert kinds == [True, False, True, False]
    assert identical(*results)


def test_a_run_learns_and_resumes_to_the_bit(cli, flags):
    flags = method_flags(flags, "full") | {"optimizer": "galore", "optimizer_args": '{"rank": 8, "gap": 2}'}
    flags |= {"max_steps": 4, "eval_interval": 4}
    assert (result := cli("finetune/full.py", **flags)).code == 0, result.err
    whole, rows = weights_of(flags["out_dir"], "full"), metrics(flags["out_dir"])
    assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"])
    whole = {name: tensor.clone() for name, tensor in whole.items()}
    max((flags["out_dir"] / "state").iterdir()).unlink()
    result = cli("finetune/full.py", **flags | {"resume": "auto"})
    assert result.code == 0 and "resumed after step" in result.out, result.err
    assert identical(weights_of(flags["out_dir"], "full"), whole) and metrics(flags["out_dir"]) == rows
    sharded = flags | {"strategy": "fsdp", "out_dir": flags["out_dir"] / "x"}
    cli("finetune/full.py", **sharded).refused("--optimizer galore", "fsdp", "ddp", code=2)
