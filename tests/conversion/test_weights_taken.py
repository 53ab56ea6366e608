"""Which weights of a folder are taken, when a head is tied, and what is refused as quantized."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.compare import off
from helpers.tiny_models import make_base, tiny_hf_model
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.checkpoints.folder import load_state
from lit_gpt.conversion import hf, hf_shards
from lit_gpt.errors import UserError

CONVERT = "scripts/convert_hf_checkpoint.py"
SINGLE, INDEX, BIN, BIN_INDEX = hf_shards.SETS


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_hf_model("llama", "llama3").save_pretrained(tmp_path / "c")
    return tmp_path / "c"


def add_sets(folder: Path, names: set[str]) -> None:
    """Leave of model.safetensors the sets that are named, each with other values: those of set i are times i."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    for i, name in enumerate(hf_shards.SETS, 1):
        if name not in names:
            continue
        scaled = {key: tensor * i for key, tensor in tensors.items()}
        file = folder / name.removesuffix(".index.json").replace(".", "-1." if "index" in name else ".")
        save_file(scaled, file, {"format": "pt"}) if "safetensors" in name else torch.save(scaled, file)
        if "index" in name:
            (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(scaled, file.name)}))


@pytest.mark.parametrize("left", range(4))
def test_the_set_that_transformers_loads_is_taken_and_said(cli, folder, left):
    names = hf_shards.SETS[left:]
    add_sets(folder, set(names))
    result = cli(CONVERT, checkpoint_dir=folder)
    assert result.code == 0, result.err
    assert (f"takes {names[0]}, as transformers does, and leaves" in result.out) == (len(names) > 1)
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()["model.norm.weight"]
    assert torch.equal(load_state(folder)["ln_f.weight"], theirs)


def test_an_index_with_other_entries_than_its_shards(cli, folder):
    """What it names in vain and what it forgets are said; the weights that are there count."""
    add_sets(folder, {INDEX})
    index = json.loads((folder / INDEX).read_text())
    norm = index["weight_map"].pop("model.norm.weight")
    index["weight_map"]["gone.weight"] = norm
    (folder / INDEX).write_text(json.dumps(index))
    result = cli(CONVERT, checkpoint_dir=folder)
    assert result.code == 0, result.err
    assert f"{INDEX}: names tensors that its shards do not hold: gone.weight" in result.out
    assert f"{INDEX}: does not name tensors that its shards hold, which are read: model.norm.weight" in result.out


def test_json_with_a_stray_comma_is_read_and_said(cli, folder):
    fields = json.loads((folder / "config.json").read_text()) | {"note": "a, ]"}
    (folder / "config.json").write_text(json.dumps(fields)[:-1] + ",\n}")
    result = cli(CONVERT, checkpoint_dir=folder)
    assert result.code == 0 and "config.json: has a comma before a closing bracket" in result.err
    (folder / "config.json").write_text("{,}" + json.dumps(fields))
    cli(CONVERT, checkpoint_dir=folder).refused("config.json", "not a readable JSON file")


def test_an_index_left_over_from_shards_that_are_gone(cli, folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    assert cli(CONVERT, checkpoint_dir=folder).code == 0
    (folder / SINGLE).rename(folder / "other.safetensors")
    cli(CONVERT, checkpoint_dir=folder).refused("model-00001-of-00002.safetensors: named by", "missing")
    (folder / INDEX).unlink()
    (folder / "tf_model.h5").touch()
    cli(CONVERT, checkpoint_dir=folder).refused("no weights, found tf_model.h5, which are not read")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.bool])
def test_codes_are_no_weights(cli, folder, dtype):
    tensors = load_file(folder / SINGLE)
    name = "model.layers.0.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name].to(dtype)}, folder / SINGLE, {"format": "pt"})
    result = cli(CONVERT, checkpoint_dir=folder)
    result.refused(name, str(dtype).removeprefix("torch."), "full precision")
    assert not (folder / "lit_model.pth").exists()


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "quanto", "compressed-tensors", None])
def test_quantized_checkpoints_are_named(cli, folder, method):
    fields = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": method} if method else {"bits": 4}
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": settings}))
    cli(CONVERT, checkpoint_dir=folder).refused("quantization_config", method or "no method named", "full precision")
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": None}))
    assert cli(CONVERT, checkpoint_dir=folder).code == 0


@pytest.mark.parametrize("differs", [False, True])
@pytest.mark.parametrize(
    ("layout", "embedding"),
    [(("granite", "granite"), "model.embed_tokens.weight"), (("gpt2", "gpt2"), "transformer.wte.weight")],
)
def test_a_stored_head_that_equals_the_embedding_stays_tied(tmp_path, layout, embedding, differs):
    """As transformers loads it; one that differs is kept apart."""
    from lit_gpt.families.registry import families

    family = next(f for f in families() if f.__name__.endswith("." + layout[0]))
    name = layout[1] if layout[1] in family.tiny_hf() else next(iter(family.tiny_hf()))
    tiny_hf_model(layout[0], name).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    head = tensors[embedding] + (0.1 if differs else 0)
    save_file(tensors | {"lm_head.weight": head}, tmp_path / SINGLE, {"format": "pt"})
    config = hf.convert(tmp_path, hf_shards.StoredWeights(tmp_path))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert config.tie_embeddings == (not differs)
    model = load_model(tmp_path)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())
    idx = torch.arange(12).view(1, 12)
    with torch.no_grad():
        assert off(model(idx), theirs(idx).logits) < 1e-5


def test_falcon_keeps_its_head_apart_whatever_it_holds(tmp_path):
    tiny_hf_model("falcon", "7b").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    head = tensors["transformer.word_embeddings.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, tmp_path / SINGLE, {"format": "pt"})
    assert not hf.convert(tmp_path, hf_shards.StoredWeights(tmp_path)).tie_embeddings


def test_adapters_that_carry_a_name_are_told_what_to_do(cli, llama, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "a")
    named = {name: t.clone() for name, t in model.state_dict().items() if "lora_" in name}
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file(named, path)
    flags = {"checkpoint_dir": llama, "peft_dir": tmp_path / "a", "out_dir": tmp_path / "o"}
    cli("scripts/convert_peft_adapter.py", **flags).refused("adapter's name, 'default'", "save_pretrained")
    save_file({"other": torch.zeros(1)}, path)
    cli("scripts/convert_peft_adapter.py", **flags).refused("no tensors lora_A and lora_B", "found other")


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_small_update_is_kept_in_fp32(cli, tmp_path, dtype):
    """Rounding to 16 bits swallows it: the refusal names the flag, and with that merge and export have all of it."""
    from dataclasses import asdict

    from lit_gpt.checkpoints import folder as checkpoint
    from lit_gpt.methods import finetuned_file, lora
    from lit_gpt.text.prompt_style import PromptStyle
    from lit_gpt.text.tokenizer import Tokenizer

    base = make_base(tmp_path / "base")
    hf.convert(base, hf_shards.StoredWeights(base), torch.bfloat16)
    config = lora.LoRAConfig()
    torch.manual_seed(1)
    model = lora.attach(load_model(base), config)
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=3e-5)
    record = {
        "hyperparameters": asdict(config),
        "prompt_style": PromptStyle.from_name("plain", Tokenizer(base)).to_dict(),
    }
    fingerprint = checkpoint.fingerprint(checkpoint.load_state(base))
    path = tmp_path / "run" / "lit_model_lora_finetuned.pth"
    path.parent.mkdir()
    finetuned_file.save_file(path, lora.NAME, fingerprint, finetuned_file.trained_state(model), **record)
    flags = {"checkpoint_dir": base, "lora_path": path, "out_dir": tmp_path / "m"}
    if dtype != "fp32":
        cli("scripts/merge_lora.py", **flags, dtype=dtype).refused(
            "of the finetune's change", "nothing was written", "--dtype fp32"
        )
        assert not (tmp_path / "m").exists()
        return
    result = cli("scripts/merge_lora.py", **flags, dtype=dtype)
    assert result.code == 0, result.err
    assert {str(t.dtype) for t in load_state(tmp_path / "m").values()} == {f"torch.float{dtype[2:]}"}
    assert cli("scripts/convert_lit_checkpoint.py", checkpoint_dir=tmp_path / "m", out_dir=tmp_path / "hf").code == 0


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_exports_in_another_dtype(cli, llama, tmp_path, dtype):
    flags = {"checkpoint_dir": llama, "out_dir": tmp_path / "hf", "dtype": dtype}
    assert cli("scripts/convert_lit_checkpoint.py", **flags).code == 0
    stored = load_file(tmp_path / "hf" / SINGLE)
    expected = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    assert {t.dtype for t in stored.values()} == {expected}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")


def test_dtypes_that_an_export_has_not(cli, llama, tmp_path):
    flags = {"checkpoint_dir": llama, "out_dir": tmp_path / "o"}
    cli("scripts/convert_lit_checkpoint.py", **flags, dtype="q8_0").refused("--dtype q8_0", "gguf", code=2)
    cli("scripts/convert_lit_checkpoint.py", **flags, lora_path=tmp_path / "l.pth", dtype="fp32").refused(
        "--dtype fp32", "adapter", code=2
    )
    with pytest.raises(UserError):
        hf_shards.shard_paths(tmp_path)
