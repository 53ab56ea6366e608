"""QA-LoRA, whose updates are shifts of int4's zero points: against its equation, and merged without leaving int4."""

import json

import torch

from helpers.compare import off
from helpers.methods import as_if_trained, attach_fresh
from helpers.tiny_models import model_of
from lit_gpt.checkpoints import io
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.methods import lora
from lit_gpt.model.gpt import quantize
from lit_gpt.quantization.modules import QuantizedLinear


@torch.no_grad()
def test_the_update_sums_the_inputs_of_each_group_in_float64(tmp_path):
    """Of a layer of 128 inputs, two groups, and one of 64: W x + s B A P x, with P of ones."""
    base = model_of("llama", "llama3", tmp_path)
    torch.manual_seed(1)
    model = as_if_trained(attach_fresh(load_model(tmp_path), "QA-LoRA", head=False))
    for path in ("mlp.proj", "attn.proj"):
        layer, plain = model.h[1].get_submodule(path), base.h[1].get_submodule(path)
        x = torch.randn(3, layer.in_features)
        sums = torch.stack([part.double().sum(-1) for part in x.split(64, -1)], dim=-1)
        expected = plain(x).double() + 2.0 * sums @ layer.lora_A.double().T @ layer.lora_B.double().T
        assert off(layer(x).double(), expected) < 1e-6


@torch.no_grad()
def test_merging_keeps_int4_and_its_codes(tmp_path):
    """Zero points have the model's dtype: in float32 nothing is off by more than its rounding."""
    model_of("llama", "llama3", tmp_path)
    idx = torch.arange(20).view(2, 10)
    base = quantize(load_model(tmp_path), "int4")
    codes = {
        name: module.weight.clone() for name, module in base.named_modules() if isinstance(module, QuantizedLinear)
    }
    torch.manual_seed(1)
    model = as_if_trained(attach_fresh(base, "QA-LoRA", head=False))
    logits, weights = model(idx), {path: layer.merged() for path, layer in lora.lora_layers(model).items()}
    assert lora.stays_quantized(model)
    merged = lora.merge(model)
    for path, weight in weights.items():
        layer = merged.get_submodule(path)
        assert isinstance(layer, QuantizedLinear) and torch.equal(layer.weight, codes[path])
        assert off(layer.dequantize(), weight) < 1e-6, path
    assert off(merged(idx), logits) < 1e-5


def test_from_training_to_a_merged_int4_checkpoint(cli, flags, tmp_path):
    flags |= {"lora_update": "qa", "quantize": "int4", "max_steps": 4}
    assert (result := cli("finetune/lora.py", **flags)).code == 0, result.err
    path = flags["out_dir"] / "lit_model_lora_finetuned.pth"
    place = {"checkpoint_dir": flags["checkpoint_dir"], "finetuned_path": path}
    assert (result := cli("scripts/merge_lora.py", **place, out_dir=tmp_path / "merged")).code == 0, result.err
    assert json.loads((tmp_path / "merged" / "lit_quantize.json").read_text())["quantize"] == "int4"
    codes = io.load(tmp_path / "merged" / "lit_model.pth")["h.0.attn.qkv.weight"]
    base = quantize(load_model(flags["checkpoint_dir"]), "int4")
    assert torch.equal(codes, base.get_parameter("h.0.attn.qkv.weight"))
    again = place | {"checkpoint_dir": tmp_path / "merged", "prompt": "a", "max_new_tokens": 3}
    cli("generate/lora.py", **again).refused("trained on another base")
    assert cli("generate/base.py", checkpoint_dir=tmp_path / "merged", prompt="a", max_new_tokens=3).code == 0
    assert (result := cli("scripts/merge_lora.py", **place, out_dir=tmp_path / "w", dtype="fp32")).code == 0, result.err
    assert not (tmp_path / "w" / "lit_quantize.json").exists()
