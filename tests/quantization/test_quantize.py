"""Quantized models, and the scripts with them."""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.cli import run_process, spawn
from helpers.compare import identical, off, tokens
from helpers.methods import EVERYTHING
from helpers.paths import ROOT
from helpers.runs import final, parse_flags, wait_for_step
from helpers.tiny_models import Tiny
from lit_gpt import GPT, Config
from lit_gpt.checkpoints import folder as checkpoint
from lit_gpt.checkpoints import io
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.errors import UsageError
from lit_gpt.families.registry import config_from_name
from lit_gpt.methods import adapter as adapter_module
from lit_gpt.methods import adapter_v2, finetuned_model, lora
from lit_gpt.model.packed_inputs import Targets
from lit_gpt.quantization import formats, modules
from lit_gpt.training.checks import check_quantized
from lit_gpt.training.memory.activation_checkpointing import apply_activation_checkpointing

FORMATS = list(formats.FORMATS)


def quantized(tiny: Tiny, name: str, dtype=torch.float32) -> GPT:
    if Config.from_checkpoint(tiny.folder).n_expert:
        with pytest.raises(UsageError, match="routed experts"):
            load_model(tiny.folder, dtype, quantize=name)
        pytest.skip("refused")
    return load_model(tiny.folder, dtype, quantize=name)


def plain_like(model: GPT) -> GPT:
    """Return a model without quantization that has the quantized one's weights."""
    plain = GPT(model.config).to(model.dtype).eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            layer = model.get_submodule(name.rpartition(".")[0])
            own = getattr(layer, name.rpartition(".")[2])
            parameter.copy_(modules.weight_of(layer) if name.endswith(".weight") else own)
    return plain


@torch.no_grad()
def test_a_quantized_model_is_that_of_its_dequantized_weights(tiny: Tiny):
    name = "nf4-dq"
    model, idx = quantized(tiny, name), tokens(tiny.hf)
    plain = plain_like(model)
    assert off(model(idx), plain(idx)) < 1e-5
    assert off(model(idx), load_model(tiny.folder)(idx)) > 1e-4
    cache = model.kv_cache(2, 17)
    assert (
        off(torch.cat([model(idx[:, :16], cache=cache), model(idx[:, 16:17], cache=cache)], 1), plain(idx[:, :17]))
        < 1e-5
    )
    assert modules.count_parameters(model) == sum(p.numel() for p in plain.parameters())
    linears = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding) and m is not model.wpe]
    assert not linears and not any(p.requires_grad for p in model.h.modules() if isinstance(p, nn.Parameter))
    if model.config.tie_embeddings:
        assert model.lm_head.weight is model.wte.weight and model.lm_head.scale is model.wte.scale
    bf16 = quantized(tiny, name, torch.bfloat16)
    assert bf16.dtype == bf16(idx).dtype == torch.bfloat16
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(tensors_of(bf16), tensors_of(model), strict=True))


def tensors_of(model: GPT) -> list[torch.Tensor]:
    layers = [module for module in model.modules() if isinstance(module, modules.Quantized)]
    return [layer.get_parameter(key) for layer in layers for key in layer.keys]


ATTACH = {
    "lora": lambda model: lora.attach(model, EVERYTHING),
    "adapter": lambda model: adapter_module.attach(model, adapter_module.AdapterConfig(4, 1)),
    "adapter_v2": lambda model: adapter_v2.attach(model, adapter_module.AdapterConfig(4, 1)),
}


@pytest.mark.parametrize("method", ATTACH)
def test_methods_on_a_quantized_base(llama, method):
    """Freshly attached methods give the base's logits exactly; gradients are those over its dequantized weights."""
    idx = torch.arange(3, 43).unsqueeze(0)
    targets = Targets(torch.arange(39), idx[0, 1:])
    base = load_model(llama, quantize="nf4")
    plain, model = plain_like(base), copy.deepcopy(base)
    with torch.no_grad():
        expected = base(idx)
    losses, grads = [], []
    for candidate in (model, plain):
        torch.manual_seed(1)
        candidate = ATTACH[method](candidate).eval()
        with torch.no_grad():
            assert candidate is plain or torch.equal(candidate(idx), expected)
            for parameter in candidate.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)), alpha=0.1)
        loss = candidate(idx, targets=targets)
        loss.backward()
        losses.append(loss.item())
        grads.append({name: p.grad for name, p in candidate.named_parameters() if p.requires_grad})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert grads[0].keys() == grads[1].keys() and all(off(grads[0][k], grads[1][k]) < 1e-4 for k in grads[0])


def test_activation_checkpointing_on_a_quantized_base_gives_the_same_gradients(llama):
    idx = torch.arange(3, 43).unsqueeze(0)
    grads = []
    for recomputed in (False, True):
        torch.manual_seed(1)
        model = lora.attach(load_model(llama, quantize="nf4"), EVERYTHING)
        for layer in lora.lora_layers(model).values():
            nn.init.normal_(layer.lora_B, std=0.1)
        if recomputed:
            apply_activation_checkpointing(model, "full")
        model.train()(idx, targets=Targets(torch.arange(39), idx[0, 1:])).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert identical(*grads) and all(grad.any() for grad in grads[0].values())


@torch.no_grad()
def test_lora_merges_into_the_dequantized_weights(tiny: Tiny):
    model, idx = lora.attach(quantized(tiny, "nf4"), EVERYTHING).eval(), tokens(tiny.hf)
    for layer in lora.lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    unmerged = model(idx)
    merged = lora.merge(model)
    assert not lora.lora_layers(merged) and off(merged(idx), unmerged) < 1e-5


@pytest.fixture
def stored(cli, llama, tmp_path):
    """Return a quantized checkpoint folder."""
    result = cli(
        "scripts/quantize.py", checkpoint_dir=llama, out_dir=tmp_path / "q", quantize="nf4", rounding="nearest"
    )
    assert result.code == 0 and "wrote" in result.out, result.err
    return tmp_path / "q"


@pytest.mark.parametrize("name", FORMATS)
def test_a_stored_model_is_the_one_quantized_on_the_fly(cli, llama, tmp_path, name):
    more = {"quantize": name, "rounding": "nearest"}
    assert cli("scripts/quantize.py", checkpoint_dir=llama, out_dir=tmp_path / "q", **more).code == 0
    for dtype in (None, torch.bfloat16):
        a, b = load_model(tmp_path / "q", dtype), load_model(llama, dtype, quantize=name)
        assert identical(a.state_dict(), b.state_dict())
    record = json.loads((tmp_path / "q" / "lit_quantize.json").read_text())
    assert record["source"] == checkpoint.fingerprint(checkpoint.load_state(llama))


@pytest.mark.subprocess
def test_qlora_from_start_to_end(cli, flags, llama, stored, monkeypatch):
    """A run learns; killed and resumed it ends with the same bits; on the stored checkpoint it gives the same; the file
    answers as trained, and merged it is the same function."""
    result = run_process("finetune/lora.py", **flags, quantize="nf4")
    out = flags["out_dir"]
    assert result.code == 0, result.err
    summary = json.loads((out / "summary.json").read_text())
    assert summary["val_loss_last"] < summary["val_loss_first"] - 0.5
    assert summary["base_quantization"] == "nf4"
    killed = flags | {"out_dir": out.with_name("killed"), "resume": "auto", "quantize": "nf4"}
    process = spawn("finetune/lora.py", **killed)
    wait_for_step(process, killed["out_dir"], 4)
    process.kill()
    process.communicate()
    on_stored = {k: v for k, v in killed.items() if k != "quantize"} | {"checkpoint_dir": stored}
    assert "resumed" in run_process("finetune/lora.py", **on_stored, activation_checkpointing="full").out
    assert identical(final(out), final(killed["out_dir"]))
    cli("finetune/lora.py", **killed | {"quantize": "int8"}).refused("another quantization")

    path, place = out / "lit_model_lora_finetuned.pth", {"temperature": 0, "max_new_tokens": 8, "precision": "fp32"}
    assert io.load(path)["quantize"] == "nf4"
    merged = out.with_name("merged")
    result = cli("scripts/merge_lora.py", checkpoint_dir=stored, lora_path=path, out_dir=merged)
    assert result.code == 0, result.err
    assert not modules.is_quantized(load_model(merged)) and checkpoint.load_state(merged)
    model, _ = finetuned_model.load_finetuned(llama, path, "lora")  # without being told how its base was quantized
    with torch.no_grad():
        idx = torch.arange(5, 45).unsqueeze(0)
        assert modules.is_quantized(model) and off(load_model(merged)(idx), model(idx)) < 1e-5
    answers = [
        cli("generate/lora.py", checkpoint_dir=folder, lora_path=path, prompt="describe the cat 1", **place, **more).out
        for folder in (llama, stored) for more in ({}, {"merge": "true"})
    ]  # fmt: skip
    answers += [cli("generate/full.py", checkpoint_dir=merged, prompt="describe the cat 1", **place).out]
    assert len(set(answers)) == 1 and answers[0]
    adapter = out.with_name("peft")  # which goes onto full weights
    result = cli("scripts/convert_lit_checkpoint.py", checkpoint_dir=llama, lora_path=path, out_dir=adapter)
    figures = json.loads((adapter / "export.json").read_text())
    assert "trained on a base in nf4" in result.out and figures["trained_on"] == "nf4", result.err
    assert figures["logits_difference"] < 1e-5 < 1e-2 < figures["logits_difference_from_training"] < 0.5
    cli("generate/lora.py", checkpoint_dir=llama, lora_path=path, quantize="int8").refused("--prompt", code=2)
    cli("generate/lora.py", checkpoint_dir=llama, lora_path=path, quantize="int8", prompt="x").refused(
        "lit_model_lora_finetuned.pth", "nf4", "int8"
    )


def test_bad_input(cli, flags, llama, stored, tmp_path):
    cli("generate/base.py", checkpoint_dir=stored, prompt="x", quantize="nf4").refused("already", "nf4", code=2)
    cli("scripts/quantize.py", checkpoint_dir=stored, out_dir=tmp_path / "x").refused("already", code=2)
    cli("scripts/quantize.py", checkpoint_dir=llama).refused("--out_dir", code=2)
    cli("scripts/quantize.py", checkpoint_dir=llama, out_dir=stored).refused("not an empty folder")
    cli("scripts/quantize.py", checkpoint_dir=llama, quantize="int3").refused("--quantize", "nf4-dq", "int3", code=2)
    cli("scripts/convert_lit_checkpoint.py", checkpoint_dir=stored, out_dir=tmp_path / "x").refused("is quantized")
    full = {k: v for k, v in flags.items() if not k.startswith("lora")}
    cli("finetune/full.py", **full, quantize="nf4").refused("--quantize nf4", "finetune/lora.py", code=2)
    cli("finetune/full.py", **full | {"checkpoint_dir": stored}).refused("cannot train", code=2)
    for strategy in ("fsdp", "deepspeed"):
        method, args = parse_flags("lora", quantize="nf4", strategy=strategy, checkpoint_dir=llama)
        with pytest.raises(UsageError, match=f"--strategy {strategy}"):
            check_quantized(args, method.trains_base, "nf4")
    record = json.loads((stored / "lit_quantize.json").read_text())
    for change, words in (
        ({"format_version": 9}, "version 9, expected 1"),
        ({"format_version": "1"}, "version '1', expected 1"),
        ({"quantize": "int3"}, "'int3'"),
        ({"quantize": ["nf4"]}, "['nf4']"),
        ({"source": None}, "source: expected"),
    ):
        (stored / "lit_quantize.json").write_text(json.dumps(record | change))
        cli("generate/base.py", checkpoint_dir=stored, prompt="x").refused("lit_quantize.json", words)
    (stored / "lit_quantize.json").write_text('{"format_version": 1, "quantize": "nf4"}')
    cli("generate/base.py", checkpoint_dir=stored, prompt="x").refused("lit_quantize.json", "source: expected")
    (stored / "lit_quantize.json").unlink()
    (stored / "lit_quantize.json").mkdir()  # as a file that may not be read, which a test run by root has none of
    cli("generate/base.py", checkpoint_dir=stored, prompt="x").refused("lit_quantize.json: Is a directory")
    (stored / "lit_quantize.json").rmdir()
    (stored / "lit_quantize.json").write_text("{")
    cli("generate/base.py", checkpoint_dir=stored, prompt="x").refused("lit_quantize.json", "quantize again")
    (stored / "lit_quantize.json").write_text(json.dumps(record))
    contents = (stored / "lit_model.pth").read_bytes()
    (stored / "lit_model.pth").write_bytes(contents[: len(contents) // 2])
    cli("generate/base.py", checkpoint_dir=stored, prompt="x").refused("lit_model.pth", "truncated")


def test_weights_that_are_not_numbers(cli, llama, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(llama, folder)
    state = {name: tensor.clone() for name, tensor in checkpoint.load_state(llama).items()}
    state["h.1.mlp.proj.weight"][0, 0] = math.nan
    io.save(folder / "lit_model.pth", state)
    where = {"checkpoint_dir": folder, "out_dir": tmp_path / "x"}
    cli("scripts/quantize.py", **where, rounding="nearest").refused("h.1.mlp.proj.weight")
    (tmp_path / "t.txt").write_text("the cat and the dog " * 99)
    cli("scripts/quantize.py", **where, calibration_path=tmp_path / "t.txt").refused("h.1.mlp.proj.weight")
    assert not (tmp_path / "x").exists()


def test_the_plan_knows_the_quantized_size(cli, stored):
    flags = {"method": "lora", "micro_batch_size": 1, "max_seq_length": 64, "json": "true", "device": "cuda"}
    plain, small = (
        json.loads(cli("scripts/plan.py", model="pythia-70m", **flags, **more).out)
        for more in ({}, {"quantize": "nf4"})
    )
    config = config_from_name("pythia-70m")
    tables, blocks = 2 * config.padded_vocab_size * config.n_embd, 12 * config.n_embd**2 * config.n_layer
    assert small["parameters"] == plain["parameters"] and small["trainable"] == plain["trainable"]
    assert plain["weights"] - small["weights"] == pytest.approx(tables + blocks * (2 - 4.5 / 8), rel=0.02)
    plan = json.loads(cli("scripts/plan.py", checkpoint_dir=stored, **flags).out)
    model = load_model(stored, torch.bfloat16)
    held = sum(p.nbytes for p in model.parameters()) + 4 * plan["trainable"]
    assert held < plan["weights"] < held + 6 * 64 * 8  # the row's tensors are counted, too: five and the samples' ends


@pytest.mark.subprocess
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of memory")
def test_loading_needs_one_blocks_size_beside_the_result():
    """Measure resident memory, pages of the mapped file included, with 4 layers in bf16, quantized on the fly."""
    argv = [sys.executable, ROOT / "benchmarks/quantize_memory.py", "--n_layer=4", "--n_embd=1536", "--vocabulary=300"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    measured = json.loads(subprocess.run(argv, env=env, capture_output=True, text=True, check=True).stdout)
    plain, small = measured["bf16"], measured["nf4"]
    assert small["weights"] < 0.3 * plain["weights"]
    assert small["peak"] < small["weights"] + measured["block"]
    assert small["resident"] < 0.35 * plain["weights"]
