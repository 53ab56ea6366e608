"""GLoRA against PEFT's, with biases and in fused layers; the battery of all methods runs over it in test_methods.py."""

from dataclasses import replace

import peft
import pytest
import torch
from torch import nn

from helpers.compare import off, tokens
from helpers.methods import EVERYTHING, as_if_trained, attach_fresh
from helpers.tiny_models import model_of, tiny_hf_model
from lit_gpt import GPT
from lit_gpt.conversion.peft import lora as peft_files
from lit_gpt.errors import UsageError, UserError
from lit_gpt.families.registry import config_from_name
from lit_gpt.methods import lora
from lit_gpt.model.packed_inputs import Targets
from lit_gpt.training.optimizers import groups

APART = {
    "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.proj": ["self_attn.o_proj"],
    "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.proj": ["mlp.down_proj"],
}
LETTERS = {"lora_B": "B.default.Xd", "lora_A": "B.default.Xu", "scale_B": "A.default.Xd", "scale_A": "A.default.Xu"}
VECTORS = {"bias_scale": "D.default.X", "bias_shift": "E.default.X", "bias_mix": "C.default.X"}


def parts_of(layer: nn.Module, name: str, of) -> list[torch.Tensor]:
    """Return what a layer has under a name by projection, `of` its parameter or that one's gradient."""
    tensor = of(layer.get_parameter(name))
    if name.endswith("_A"):
        return list(tensor.split(layer.r))
    return list(tensor) if name == "bias_mix" else list(tensor.split(layer.sizes))


@pytest.mark.parametrize("layout", ["biased", "llama3"])
def test_logits_and_gradients_equal_peft(tmp_path, layout):
    """PEFT has no scale: alpha is r. Without a bias neither changes one."""
    torch.manual_seed(1)
    model = attach_fresh(model_of("llama", layout, tmp_path), "GLoRA", head=False, alpha=4)
    as_if_trained(model)
    config = peft.GloraConfig(r=4, target_modules="all-linear", config_C="vector", config_D_E="vector")
    theirs = peft.get_peft_model(tiny_hf_model("llama", layout), config).eval()
    parameters, pairs = dict(theirs.named_parameters()), []
    for path, layer in lora.lora_layers(model).items():
        _, i, module = path.split(".", 2)
        for ours, letter in (LETTERS | (VECTORS if layer.bias_scale is not None else {})).items():
            for at, part in enumerate(parts_of(layer, ours, lambda p: p.detach())):
                name = f"base_model.model.model.layers.{i}.{APART[module][at]}.glora_{letter}"
                parameters[name].data.copy_(part.view_as(parameters[name]))
                pairs.append((layer, ours, at, parameters[name]))
    assert len(pairs) == sum(p.requires_grad for p in parameters.values())
    idx = tokens(theirs, rows=1)
    logits = theirs(idx).logits
    assert off(model(idx), logits) < 1e-5
    (model(idx, targets=Targets(torch.arange(39), idx[0, 1:])) / 39).backward()
    nn.functional.cross_entropy(logits[0, :-1], idx[0, 1:]).backward()
    for layer, ours, at, parameter in pairs:
        assert off(parts_of(layer, ours, lambda p: p.grad)[at], parameter.grad.view_as(
            parts_of(layer, ours, lambda p: p.grad)[at])) < 1e-5  # fmt: skip


def test_falcon_7b_and_groups_of_the_optimizer():
    with torch.device("meta"):
        config = lora.LoRAConfig(update="glora", dropout=0.0, lr_ratio=16)
        model = lora.attach(GPT(config_from_name("falcon-7b")), config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 7_012_352
    from lit_gpt.training.args import OptimizationArgs

    found = {group["lr_ratio"]: len(group["params"]) for group in groups(model, lora.LoRA(config), OptimizationArgs())}
    assert found == {1.0: 64, 16.0: 64}


def test_what_it_does_not_go_with_is_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match="--lora_update glora with --lora_dropout 0.05: .* give --lora_dropout 0"):
        lora.LoRAConfig(update="glora")
    with pytest.raises(UsageError, match="--lora_update glora with --lora_init pissa"):
        replace(EVERYTHING, update="glora", init="pissa")
    with pytest.raises(UsageError, match="--lora_update glora: .* has experts"):
        lora.attach(model_of("mixtral", "mixtral", tmp_path), replace(EVERYTHING, update="glora"))
    model = attach_fresh(model_of("llama", "llama3", tmp_path / "b"), "GLoRA")
    with pytest.raises(UserError, match="--lora_update glora: .* merge it"):
        peft_files.write(tmp_path, model, replace(EVERYTHING, update="glora"), "base")


@pytest.mark.slow  # the battery has each of its parts
def test_a_run_that_is_merged(cli, flags, tmp_path):
    flags |= {"lora_update": "glora", "lora_dropout": 0, "max_steps": 3}
    assert (result := cli("finetune/lora.py", **flags)).code == 0, result.err
    own = {
        "finetuned_path": flags["out_dir"] / "lit_model_lora_finetuned.pth",
        "checkpoint_dir": flags["checkpoint_dir"],
    }
    assert (result := cli("scripts/merge_lora.py", **own, out_dir=tmp_path / "m")).code == 0, result.err
    assert cli("generate/lora.py", **own, prompt="a", max_new_tokens=3).code == 0
