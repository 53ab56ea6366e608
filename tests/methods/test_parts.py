"""Parts of the base that train themselves: gradients of transformers, and from training to a merged checkpoint.

The battery of all methods runs over them in test_methods.py.
"""

import pytest
import torch

from helpers.compare import identical, off
from helpers.methods import STYLE, as_if_trained, lora_files
from helpers.runs import final, metrics, weights_of
from helpers.tiny_models import make_base, tiny_hf_model
from lit_gpt import GPT
from lit_gpt.checkpoints import folder, io
from lit_gpt.checkpoints.base_model import BaseCheckpoint, load_model
from lit_gpt.conversion import hf, hf_shards, weights
from lit_gpt.conversion.peft import lora as peft_files
from lit_gpt.errors import UsageError, UserError
from lit_gpt.families.registry import config_from_name
from lit_gpt.methods import finetuned_file, finetuned_model, lora
from lit_gpt.methods.hyperparameters import PartsConfig
from lit_gpt.methods.multi_lora import LoRAPool
from lit_gpt.methods.parts import BitFit, BitFitConfig
from lit_gpt.model.gpt import quantize
from lit_gpt.model.packed_inputs import Targets
from lit_gpt.text.prompt_style import PromptStyle

NORMS, BOTH = PartsConfig(norms=True), PartsConfig(norms=True, embeddings="both")


def with_parts(model: GPT, parts: PartsConfig = BOTH, **settings) -> GPT:
    return lora.attach(model, lora.LoRAConfig(r=4, dropout=0.0, parts=parts, **settings))


# A tied head and learned positions, a head of its own, norms of queries and keys.
@pytest.mark.parametrize("layout", [("gpt2", "gpt2"), ("llama", "llama3"), ("qwen", "qwen3")], ids="-".join)
def test_gradients_are_those_of_transformers(tmp_path, layout):
    theirs, idx = tiny_hf_model(*layout), torch.arange(3, 23).unsqueeze(0)
    theirs.save_pretrained(tmp_path)
    hf.convert(tmp_path, hf_shards.StoredWeights(tmp_path))
    theirs(idx, labels=idx).loss.backward()
    grads, config = {name: p.grad for name, p in theirs.named_parameters()}, load_model(tmp_path).config
    wanted = dict(weights.to_lit(weights.rows(config), grads))
    seen = set()
    for model in (with_parts(load_model(tmp_path)), BitFit(BitFitConfig(BOTH)).attach(load_model(tmp_path))):
        (model(idx, targets=Targets(torch.arange(19), idx[0, 1:])) / 19).backward()
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_" not in name:
                for inner in ("norm", "embedding", "linear"):
                    name = name.replace(f".{inner}.weight", ".weight").replace(f".{inner}.bias", ".bias")
                assert off(p.grad, wanted[name]) < 1e-5, name
                seen.add(name)
    left = {name for name in wanted.keys() - seen if name.endswith("bias") or wanted[name].ndim == 1}
    assert {"wte.weight", "ln_f.weight"} <= seen and not left
    assert config.tie_embeddings or "lm_head.weight" in seen


def test_parts_of_falcon_7b():
    """The head is the embedding. BitFit has nothing but the norms' biases there."""
    with torch.device("meta"):
        base = GPT(config_from_name("falcon-7b"))
        norms = 2 * 4544 * 33
        model = lora.attach(base, lora.LoRAConfig(parts=PartsConfig(norms=True, embeddings="input")))
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        bitfit = BitFit(BitFitConfig()).attach(GPT(config_from_name("falcon-7b")))
    assert count == 3_506_176 + norms + 65024 * 4544
    assert sum(p.numel() for p in bitfit.parameters() if p.requires_grad) == norms // 2


@torch.no_grad()
def test_in_16_bits_what_trains_is_float32_and_the_rest_stays_as_it_was(tmp_path):
    make_base(tmp_path)
    base, idx = load_model(tmp_path, torch.bfloat16), torch.arange(20).unsqueeze(0)
    model = with_parts(load_model(tmp_path, torch.bfloat16))
    assert torch.equal(model(idx), base(idx)) and model.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    merged = lora.merge(as_if_trained(model))
    assert all(p.dtype == torch.bfloat16 for p in merged.parameters())


def test_what_does_not_go_together_is_refused_by_name(tmp_path):
    make_base(tmp_path / "llama")
    base = load_model(tmp_path / "llama")
    with pytest.raises(UsageError, match="--train_embeddings: .* quantized"):
        with_parts(quantize(load_model(tmp_path / "llama"), "nf4"))
    with_parts(quantize(load_model(tmp_path / "llama"), "nf4"), NORMS)
    with pytest.raises(UsageError, match="--train_embeddings both with --lora_head true"):
        with_parts(base, head=True)
    with pytest.raises(UsageError, match="has no biases; give --train_norms true"):
        BitFit(BitFitConfig()).attach(load_model(tmp_path / "llama"))
    with pytest.raises(UserError, match="--train_norms true: a PEFT adapter .* merge it"):
        peft_files.write(tmp_path, with_parts(base, NORMS), lora.LoRAConfig(r=4, parts=NORMS), "base")
    (path,) = lora_files(tmp_path / "llama", [lora.LoRAConfig(r=4, parts=NORMS)])
    checkpoint = BaseCheckpoint.open(tmp_path / "llama")
    with pytest.raises(UserError, match="trained with --train_norms true, .* merge it"):
        LoRAPool.beside(checkpoint, [path], PromptStyle.from_dict(STYLE))


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_from_training_to_a_merged_checkpoint(cli, tmp_path, data_dir, flags, tied):
    """Resumed to the bit; answered with; merged with the logits that they had apart."""
    place = flags["checkpoint_dir"]
    if tied:
        place = tmp_path / "base"
        make_base(place, "llama", "smollm2")
    flags = flags | {"checkpoint_dir": place, "train_norms": "true", "train_embeddings": "both", "max_steps": 3}
    assert (result := cli("finetune/lora.py", **flags)).code == 0, result.err
    whole, rows = final(flags["out_dir"]), metrics(flags["out_dir"])
    assert "wte.embedding.weight" in whole and ("lm_head.linear.weight" in whole) == (not tied)
    path = flags["out_dir"] / "lit_model_lora_finetuned.pth"
    path.unlink()
    max((flags["out_dir"] / "state").iterdir()).unlink()
    assert (result := cli("finetune/lora.py", **flags | {"resume": "auto"})).code == 0, result.err
    assert identical(final(flags["out_dir"]), whole) and metrics(flags["out_dir"]) == rows
    own = {"checkpoint_dir": place, "finetuned_path": path}
    again = flags | {"finetuned_path": path, "out_dir": tmp_path / "on", "train_embeddings": "input"}
    cli("finetune/lora.py", **again).refused("--train_embeddings input", "both; give that", code=2)
    assert (result := cli("generate/lora.py", **own, prompt="a", max_new_tokens=3)).code == 0, result.err
    assert (result := cli("scripts/merge_lora.py", **own, out_dir=tmp_path / "m")).code == 0, result.err
    idx = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        model, _ = finetuned_model.load_finetuned(place, path, "lora")
        assert off(load_model(tmp_path / "m")(idx), model(idx)) < 1e-5
    merged, base = io.load(tmp_path / "m" / "lit_model.pth"), folder.load_state(place)
    assert merged.keys() == base.keys() and not torch.equal(merged["wte.weight"], base["wte.weight"])


def test_bitfit_from_training_to_a_merged_checkpoint(cli, tmp_path, data_dir, flags):
    place = make_base(tmp_path / "base", "llama", "biased")
    flags = {k: v for k, v in flags.items() if not k.startswith("lora")} | {"checkpoint_dir": place, "max_steps": 4}
    assert (result := cli("finetune/bitfit.py", **flags)).code == 0, result.err
    rows = [float(row["val_loss"]) for row in metrics(flags["out_dir"]) if row["val_loss"]]
    assert rows[-1] < rows[0]
    assert {name.rpartition(".")[2] for name in weights_of(flags["out_dir"], "bitfit")} == {"bias"}
    own = {"checkpoint_dir": place, "finetuned_path": flags["out_dir"] / "lit_model_bitfit_finetuned.pth"}
    assert cli("generate/finetuned.py", **own, prompt="a", max_new_tokens=3).code == 0
    assert (result := cli("scripts/merge_lora.py", **own, out_dir=tmp_path / "m")).code == 0, result.err
    idx = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        model, _ = finetuned_model.load_finetuned(place, own["finetuned_path"], None)
        assert off(load_model(tmp_path / "m")(idx), model(idx)) < 1e-5
        assert off(model(idx), load_model(place)(idx)) > 1e-3


def test_a_merge_that_stays_int4_has_the_norms_too(tmp_path):
    """Of QA-LoRA, whose merge writes the base's codes with other zero points."""
    make_base(tmp_path / "base")
    base = BaseCheckpoint.open(tmp_path / "base", "int4")
    config = lora.LoRAConfig(update="qa", r=4, parts=NORMS)
    model = as_if_trained(lora.attach(base.build(), config))
    path = tmp_path / "base" / "f.pth"
    record = {"hyperparameters": lora.LoRA(config).settings, "prompt_style": STYLE, "quantize": "int4"}
    finetuned_file.save_file(path, "lora", base.fingerprint, finetuned_file.trained_state(model), **record)
    from lit_gpt.conversion import export

    assert export.merge(tmp_path / "base", path, tmp_path / "m") < 0.05
    merged = load_model(tmp_path / "m")
    assert torch.equal(merged.h[1].norm_2.weight, model.h[1].norm_2.norm.weight)
