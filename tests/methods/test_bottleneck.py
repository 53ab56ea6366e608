"""Bottleneck adapters against their equations; the battery of all methods runs over them in test_methods.py."""

import pytest
import torch
import torch.nn.functional as F

from helpers.compare import off
from helpers.methods import as_if_trained
from helpers.runs import metrics, weights_of
from helpers.tiny_models import model_of
from lit_gpt import GPT
from lit_gpt.errors import UsageError
from lit_gpt.families.registry import config_from_name
from lit_gpt.methods.bottleneck import Bottlenecks
from lit_gpt.methods.hyperparameters import BottleneckConfig


def attached(tmp_path, layout=("llama", "llama3"), **settings) -> GPT:
    torch.manual_seed(1)
    model = Bottlenecks(BottleneckConfig(size=8, **settings)).attach(model_of(*layout, tmp_path))
    return as_if_trained(model)


def by_formula(bottleneck, x, activation, scale=1.0):
    """Return s U f(D x + c) + s e in float64."""
    down, c, up, e = (
        p.detach().double() for p in (bottleneck.down, bottleneck.down_bias, bottleneck.up, bottleneck.up_bias)
    )
    if isinstance(bottleneck.norm, torch.nn.LayerNorm):
        x = F.layer_norm(x, x.shape[-1:], bottleneck.norm.weight.double(), bottleneck.norm.bias.double())
    return scale * (activation(x @ down.T + c) @ up.T + e)


@torch.no_grad()
def test_bottlenecks_follow_their_equations_in_float64(tmp_path):
    x = torch.randn(2, 7, 64)
    for settings, activation in (({"activation": "gelu"}, F.gelu), ({"norm": True}, F.relu)):
        model = attached(tmp_path, place="both", **settings)
        for module in (model.h[1].post_norm_1, model.h[1].post_norm_2):
            expected = x.double() + by_formula(module.bottleneck, x.double(), activation)
            assert off(module(x).double(), expected) < 1e-6
    mlp = attached(tmp_path, place="parallel", scale=4.0).h[0].mlp
    expected = mlp.mlp(x).double() + by_formula(mlp.bottleneck, x.double(), F.relu, 4.0)
    assert off(mlp(x).double(), expected) < 1e-6


def test_where_they_are(tmp_path):
    both, mlp, beside = (attached(tmp_path, place=place) for place in ("both", "mlp", "parallel"))
    assert [hasattr(block.post_norm_1, "bottleneck") for block in both.h] == [True, True]
    assert not hasattr(mlp.h[0].post_norm_1, "bottleneck") and hasattr(mlp.h[0].post_norm_2, "bottleneck")
    assert not hasattr(beside.h[0].post_norm_2, "bottleneck") and hasattr(beside.h[0].mlp, "bottleneck")


def test_layers_before_the_first_have_none_and_no_gradient_goes_there(tmp_path):
    model, method = attached(tmp_path, start_layer=1), Bottlenecks(BottleneckConfig(start_layer=1))
    assert method.first_trained_layer == 1
    assert not [name for name, p in model.named_parameters() if p.requires_grad and name.startswith("h.0.")]


def test_a_random_number_of_first_layers_is_left_out_in_training(tmp_path):
    """All numbers come, and each gives what the model without the bottlenecks of these layers gives."""
    model = attached(tmp_path, drop=2)
    idx, whole = torch.arange(9).unsqueeze(0), {}
    with torch.no_grad():
        for left_out in range(3):
            less = attached(tmp_path, drop=2)
            for block in less.h[:left_out]:
                block.post_norm_1, block.post_norm_2 = block.post_norm_1.norm, block.post_norm_2.norm
            whole[left_out] = less(idx)
        assert torch.equal(model(idx), whole[0])
        model.train()
        seen = set()
        for seed in range(12):
            torch.manual_seed(seed)
            logits = model(idx)
            seen |= {n for n, expected in whole.items() if off(logits, expected) < 1e-6}
    assert seen == {0, 1, 2}


@pytest.mark.parametrize(("place", "expected"), [("both", 37_519_360), ("mlp", 18_759_680), ("parallel", 18_759_680)])
def test_trainable_parameters_of_falcon_7b(place, expected):
    with torch.device("meta"):
        model = Bottlenecks(BottleneckConfig(size=64, place=place)).attach(GPT(config_from_name("falcon-7b")))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--bottleneck_start_layer 2: the model has only 2 layers"):
        attached(tmp_path, start_layer=2)
    with pytest.raises(UsageError, match="--bottleneck_drop 1 with --bottleneck_start_layer 1"):
        BottleneckConfig(drop=1, start_layer=1)


def test_from_training_to_an_answer(cli, flags):
    flags = {k: v for k, v in flags.items() if not k.startswith("lora")} | {"learning_rate": 0.01, "bottleneck_drop": 1}
    result = cli("finetune/bottleneck.py", **flags)
    assert result.code == 0, result.err
    rows = [float(row["val_loss"]) for row in metrics(flags["out_dir"]) if row["val_loss"]]
    assert rows[-1] < rows[0] and weights_of(flags["out_dir"], "bottleneck")
    place = {"checkpoint_dir": flags["checkpoint_dir"]}
    place["finetuned_path"] = flags["out_dir"] / "lit_model_bottleneck_finetuned.pth"
    result = cli("generate/finetuned.py", **place, prompt="describe the cat 1", temperature=0, max_new_tokens=5)
    assert result.code == 0 and "tokens" in result.err, result.err
    cli("generate/ia3.py", **place, prompt="a").refused("trained by the method bottleneck", "expected ia3")
