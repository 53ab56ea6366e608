"""Ranks of single layers, by a pattern and by EVA: what they give, where they go, and what is refused."""

from dataclasses import replace

import peft
import pytest
import torch
import yaml

from helpers.compare import off, tokens
from helpers.methods import EVERYTHING, STYLE, lora_files
from helpers.runs import final, planner_of
from helpers.steps import random_row
from helpers.tiny_models import make_base, model_of, tiny_hf_model
from lit_gpt.checkpoints.base_model import BaseCheckpoint, load_model
from lit_gpt.conversion.peft import lora as peft_files
from lit_gpt.errors import UsageError
from lit_gpt.families.registry import config_from_name
from lit_gpt.methods import finetuned_file, finetuned_model, lora
from lit_gpt.methods.method import Start
from lit_gpt.methods.multi_lora import LoRAPool
from lit_gpt.text.prompt_style import PromptStyle

RANKS = {r"h\.0\.mlp": 0, r"attn\.qkv": 2, "lm_head": 6}
SOME = replace(EVERYTHING, ranks=RANKS)


def test_the_first_pattern_that_is_found_decides_and_scales_go_with_the_rank(tmp_path):
    model = lora.attach(model_of("llama", "llama3", tmp_path), SOME)
    found = {path: layer.r for path, layer in lora.lora_layers(model).items()}
    assert found == {
        "h.0.attn.qkv": 2, "h.0.attn.proj": 4, "h.1.attn.qkv": 2, "h.1.attn.proj": 4, "h.1.mlp.gate_up": 4,
        "h.1.mlp.proj": 4, "lm_head": 6,
    }  # fmt: skip
    assert model.h[1].attn.qkv.scale == 8 / 2 and model.lm_head.scale == 8 / 6
    assert model.h[1].attn.qkv.lora_A.shape == (3 * 2, 64)


@torch.no_grad()
@pytest.mark.parametrize("change", [{}, {"scaling": "sqrt_r"}, {"update": "multi"}, {"init": "pissa"}], ids=str)
def test_saved_loaded_merged_in_a_batch_and_by_peft(tmp_path, change):
    base, config = make_base(tmp_path / "base"), replace(SOME, **change)
    (path,) = lora_files(base, [config])
    model, _ = finetuned_model.load_finetuned(base, path, "lora")
    idx = tokens(model)
    logits = model(idx)
    checkpoint = BaseCheckpoint.open(base)
    pool = LoRAPool.beside(checkpoint, [path], PromptStyle.from_dict(STYLE))
    pool.choose([1, 1])
    assert off(pool.model.eval()(idx), logits) < 1e-5
    peft_files.write(tmp_path, model, config, str(base))
    theirs = peft.PeftModel.from_pretrained(
        tiny_hf_model("llama", "llama3", vocab_size=320, max_position_embeddings=256), tmp_path
    )
    model = model.double()  # PiSSA's update is a difference of large factors
    logits = model(idx)
    assert off(theirs.eval().double()(idx).logits, logits) < 1e-5
    settings, state, _ = peft_files.read(tmp_path, checkpoint.config, dict(load_model(base).state_dict()))
    again = lora.attach(load_model(base), settings)
    finetuned_file.load_trained(again, state, tmp_path)
    assert off(again.eval().double()(idx), logits) < 1e-5
    assert off(lora.merge(model)(idx), logits) < 1e-5


def test_bad_ranks_are_refused_in_one_line(tmp_path):
    model = model_of("llama", "llama3", tmp_path)
    for ranks, words in (
        ({"mlb": 4}, "--lora_ranks: 'mlb' matches no adapted layer; they are named as h.0.attn.qkv"),
        ({"": 0}, "no layer keeps a rank above 0"),
        ({"mlp": 80}, "--lora_ranks: 80: no adapted layer has a rank above"),
    ):
        with pytest.raises(UsageError, match=words):
            lora.attach(model, replace(EVERYTHING, ranks=ranks))
    for ranks, words in (
        ({"mlp": -1}, "'mlp': -1, expected a whole number"),
        ({"mlp": 2.5}, "'mlp': 2.5, expected a whole number"),
        ({"(": 1}, r"'\(': no regular expression"),
    ):
        with pytest.raises(UsageError, match=f"--lora_ranks: {words}"):
            lora.LoRAConfig(ranks=ranks)
    with pytest.raises(UsageError, match="--lora_ranks with --lora_update vera"):
        lora.LoRAConfig(update="vera", ranks={"mlp": 2})


def test_the_plan_counts_each_layer():
    config = replace(config_from_name("pythia-70m"), n_layer=5)
    plan = planner_of(config, "lora", lora_ranks='{"h.[0-3].": 0}').plan(([64], 64), "none")
    assert plan.trainable == 8 * (2 * 512 + 2 * 512)


@torch.no_grad()
def test_ranks_go_to_the_directions_that_explain_most_in_float64(tmp_path):
    """As many as before in all; no layer above rho times as many; a fused layer takes one for each projection."""
    base, row, inputs = model_of("llama", "llama3", tmp_path), random_row(), {}
    config = lora.LoRAConfig(r=3, key=True, projection=True, mlp=True)
    model = lora.attach(load_model(tmp_path), config)
    layers = lora.lora_layers(model)
    for path in layers:
        base.get_submodule(path).register_forward_pre_hook(
            lambda _, x, path=path: inputs.__setitem__(path, x[0].flatten(0, -2).double())
        )
    base(row.idx, segments=row.segments)
    shares = []
    for path, x in inputs.items():
        squares = torch.linalg.eigvalsh(x.T @ x).flip(0)
        shares += [(float(value / squares.sum()), path) for value in squares[:6]]
    expected, left = dict.fromkeys(layers, 0), 3 * sum(len(layer.parts) for layer in layers.values())
    for _, path in sorted(shares, reverse=True):
        if len(layers[path].parts) <= left:
            expected[path] += 1
            left -= len(layers[path].parts)
    found = lora.explained_ranks(model, config, Start(lambda text: [], lambda samples: row, 1), 2.0)
    assert found == expected and max(found.values()) <= 6 and len(set(found.values())) > 1


def test_from_eva_to_a_run(cli, flags, tmp_path):
    place = {name: flags[name] for name in ("checkpoint_dir", "data_dir")}
    own = {"lora_r": 4, "lora_mlp": "true", "lora_dropout": 0.1}
    result = cli("scripts/ranks.py", **place, **own, out=tmp_path / "ranks.yaml")
    assert result.code == 0 and "ranks from" in result.out, result.err
    said = yaml.safe_load((tmp_path / "ranks.yaml").read_text())
    assert said["lora_init"] == "eva" and said["lora_r"] == 4 and len(said["lora_ranks"]) == 6
    flags = {k: v for k, v in flags.items() if not k.startswith("lora")} | {
        "max_steps": 2,
        "config": tmp_path / "ranks.yaml",
    }
    flags |= {"warmup_steps": 0}
    assert (result := cli("finetune/lora.py", **flags)).code == 0, result.err
    for name, tensor in final(flags["out_dir"]).items():
        path, _, kind = name.rpartition(".")
        rank = next(rank for pattern, rank in said["lora_ranks"].items() if pattern == f"^{path}$".replace(".", r"\."))
        assert tensor.size(1 if kind == "lora_B" else 0) in (rank, 2 * rank)
    cli("scripts/ranks.py", **place, rho=0.5).refused("--rho 0.5", code=2)
