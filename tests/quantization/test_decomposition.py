"""Weights that are quantized together with a LoRA: less is lost at every layer, and a finetune starts from both."""

import shlex

import pytest
import torch

from helpers.compare import off
from helpers.tiny_models import model_of
from lit_gpt.checkpoints.base_model import BaseCheckpoint, load_model
from lit_gpt.errors import UsageError
from lit_gpt.methods import lora
from lit_gpt.methods.finetuned_model import load_finetuned
from lit_gpt.methods.lora.decomposition import Decomposition
from lit_gpt.model.gpt import quantize

SCRIPT = "scripts/quantize.py"


@pytest.mark.parametrize(("start", "rounds"), [("quantize", 1), ("quantize", 4), ("svd", 1)])
@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_every_layer_loses_less_than_by_rounding_alone(tmp_path, format, start, rounds):
    """By the formula of each error, computed from the model that the tensors and the LoRA make."""
    plain = model_of("llama", "llama3", tmp_path)
    weights = {name: module.weight.clone() for name, module in plain.named_modules() if hasattr(module, "weight")}
    parts = Decomposition(BaseCheckpoint.open(tmp_path, format), 8, rounds, start)
    state = dict(parts.tensors())
    model, alone = quantize(load_model(tmp_path), format), quantize(load_model(tmp_path), format)
    model.load_state_dict(state, strict=False)
    lora.attach(model, parts.config)
    model.load_state_dict(parts.state, strict=False)
    for path, layer in lora.lora_layers(model).items():
        error = (weights[path] - layer.merged(torch.float32)).norm().item()
        rounding = (weights[path] - alone.get_submodule(path).dequantize()).norm().item()
        assert error < rounding and parts.errors[path] == pytest.approx((error, rounding), rel=1e-3)
    if (start, rounds) == ("quantize", 1):  # codes of the nearest, and of the residual's singular values the tail
        path, layer = next(iter(lora.lora_layers(model).items()))
        lost, tails = weights[path] - alone.get_submodule(path).dequantize(), []
        for first, last in layer.parts:
            tails.append(torch.linalg.svdvals(lost[first:last])[8:].norm())
        assert parts.errors[path][0] == pytest.approx(torch.stack(tails).norm().item(), rel=1e-3)


def test_more_rounds_lose_no_more(tmp_path):
    model_of("llama", "llama3", tmp_path)
    found = [Decomposition(BaseCheckpoint.open(tmp_path, "nf4"), 8, rounds, "quantize") for rounds in (1, 5)]
    for parts in found:
        list(parts.tensors())
    assert all(found[1].errors[path][0] <= found[0].errors[path][0] for path in found[0].errors)
    assert found[1].share < found[0].share


def test_a_rank_beyond_a_projection_is_refused(tmp_path):
    model_of("llama", "llama3", tmp_path)
    with pytest.raises(UsageError, match="--lora_r 33: h.0.attn.qkv has only rank 32"):
        Decomposition(BaseCheckpoint.open(tmp_path, "nf4"), 33, 1, "quantize")


def test_base_and_lora_are_handed_over(cli, flags, tmp_path):
    """The two together are nearer to the base than rounding alone, and are what a finetune starts from."""
    llama, q = flags["checkpoint_dir"], tmp_path / "q"
    result = cli(SCRIPT, checkpoint_dir=llama, out_dir=q, quantize="nf4", lora_r=4)
    assert result.code == 0 and "--lora_r 4" in result.out, result.err
    path = q / "lit_model_lora_finetuned.pth"
    idx = torch.randint(90, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact, rounded = load_model(llama, torch.float32)(idx), load_model(llama, torch.float32, quantize="nf4")(idx)
        both, _ = load_finetuned(q, path, "lora", torch.float32)
        assert off(both(idx), exact) < off(rounded, exact)
    printed = shlex.split(result.out.strip().splitlines()[-1])[6:-1]
    run = {k: v for k, v in flags.items() if not k.startswith("lora")} | {"checkpoint_dir": q, "finetuned_path": path}
    run |= {flag.removeprefix("--"): value for flag, value in zip(printed[::2], printed[1::2], strict=True)} | {
        "max_steps": 2,
        "warmup_steps": 0,
    }
    assert (result := cli("finetune/lora.py", **run)).code == 0, result.err
    other = run | {"checkpoint_dir": llama, "out_dir": tmp_path / "other", "quantize": "nf4"}
    cli("finetune/lora.py", **other).refused("lit_model_lora_finetuned.pth", "goes with the nf4 weights of fingerprint")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rounding": "calibrated", "lora_r": 8}, ["--lora_r 8 with --rounding calibrated"]),
        ({"lora_start": "x", "lora_r": 8}, ["--lora_start"]),
        ({"lora_iterations": 3}, ["--lora_iterations 3", "goes with --lora_r"]),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_one_line(cli, llama, tmp_path, change, words):
    flags = {"checkpoint_dir": llama, "out_dir": tmp_path / "q"} | change
    cli(SCRIPT, **flags).refused(*words, code=2)
    assert not (tmp_path / "q").exists()
