"""Exports: what others read is what was trained, and what differs is refused."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tokenizers
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.compare import off
from helpers.exports import EXPORT, finetuned
from helpers.methods import EVERYTHING, ONE_EACH, SWITCHES
from helpers.paths import ROOT
from helpers.tiny_models import LAYOUTS as ALL_LAYOUTS
from helpers.tiny_models import make_base
from lit_gpt import GPT, Tokenizer
from lit_gpt.checkpoints import folder as checkpoint
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.conversion import export, hf, hf_shards, parity, readers
from lit_gpt.conversion.gguf import layout as gguf_layout
from lit_gpt.conversion.gguf import writer
from lit_gpt.conversion.peft import lora as peft
from lit_gpt.errors import UserError
from lit_gpt.methods import finetuned_file, finetuned_model, lora
from lit_gpt.text.prompt_style import PromptStyle

MERGE, IMPORT = "scripts/merge_lora.py", "scripts/convert_peft_adapter.py"
LAYOUTS = [("llama", "llama3"), ("falcon", "40b"), ("gpt_neox", "pythia")]  # apart, and fused in two ways
LORA = "lit_model_lora_finetuned.pth"


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: make_base(root / family, family, layout) for family, layout in LAYOUTS}


def with_lora(base: Path, config: lora.LoRAConfig = EVERYTHING) -> GPT:
    torch.manual_seed(1)
    model = lora.attach(load_model(base), config)
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model.eval()


def lora_file(base: Path, folder: Path, config: lora.LoRAConfig = EVERYTHING) -> Path:
    """What finetune/lora.py would have left."""
    folder.mkdir(parents=True)
    style = PromptStyle.from_name("alpaca", Tokenizer(base)).to_dict()
    record = {"hyperparameters": asdict(config), "prompt_style": style}
    fingerprint = checkpoint.fingerprint(checkpoint.load_state(base))
    finetuned_file.save_file(
        folder / LORA, "lora", fingerprint, finetuned_file.trained_state(with_lora(base, config)), **record
    )
    return folder / LORA


def tokens(rows: int = 2) -> torch.Tensor:
    return torch.randint(320, (rows, 40), generator=torch.Generator().manual_seed(3))


# --- PEFT, out


@pytest.mark.parametrize("config", [EVERYTHING, *ONE_EACH], ids=["all", *SWITCHES])
@pytest.mark.parametrize("family", ["llama", "falcon", "gpt_neox"])
@torch.no_grad()
def test_peft_computes_the_same(bases, tmp_path, family, config):
    base, config = bases[family], replace(config, alpha=6, dropout=0.1)
    export.to_peft(base, lora_file(base, tmp_path / "run", config), tmp_path / "peft")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "peft")
    idx = tokens()
    assert off(theirs(idx).logits, with_lora(base, config)(idx)) < 1e-5
    fields = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert fields["lora_alpha"] / fields["r"] == 1.5 and fields["lora_dropout"] == 0.1
    assert (fields["bias"], fields["task_type"], fields["peft_type"]) == ("none", "CAUSAL_LM", "LORA")
    if family == "llama":
        assert (fields["r"], fields["lora_alpha"], fields["rank_pattern"]) == (4, 6, {})


@pytest.mark.parametrize("family", sorted({family for family, _ in ALL_LAYOUTS}))
def test_every_family_goes_through_the_gate(tmp_path, family):
    """The first layout of each: as transformers' folder and as an adapter. Experts have no linear layer for one."""
    base = make_base(tmp_path / "base", family, dict(reversed(ALL_LAYOUTS))[family])
    assert export.to_hf(base, tmp_path / "hf")["reader"] == "transformers"
    experts = load_model(base).config.mlp_class == "MoE"
    if experts:
        with pytest.raises(UserError, match="LoRA of .* cannot be a PEFT adapter"):
            export.to_peft(base, lora_file(base, tmp_path / "run"), tmp_path / "peft")
    projection = family not in ("falcon_h1", "falcon_mamba", "nemotron_h")  # whose output projections PEFT refuses
    path = lora_file(base, tmp_path / "further", replace(EVERYTHING, mlp=not experts, projection=projection))
    assert export.to_peft(base, path, tmp_path / "peft")["reader"] == "PEFT"


@pytest.mark.parametrize("family", ["llama", "falcon", "gpt_neox"])
def test_there_and_back_is_bit_identical(bases, tmp_path, family):
    base, config = bases[family], replace(EVERYTHING, key=False, alpha=6, dropout=0.1)
    path = lora_file(base, tmp_path / "run", config)
    export.to_peft(base, path, tmp_path / "peft")
    assert export.from_peft(tmp_path / "peft", base, tmp_path / "back") == config
    before, after = (torch.load(p) for p in (path, tmp_path / "back" / LORA))
    assert before["state"].keys() == after["state"].keys() and before["prompt_style"]["stop_ids"]
    assert all(torch.equal(before["state"][name], after["state"][name]) for name in before["state"])
    tokenizer = Tokenizer(base)
    styles = [PromptStyle.from_dict(contents["prompt_style"]) for contents in (before, after)]
    assert len({style.render(parity.CONVERSATIONS[1], tokenizer, answer=True) for style in styles}) == 1


# --- PEFT, in

ADAPTERS = {  # fields of PEFT's LoraConfig
    "all linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj", "o_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 8},
        "alpha_pattern": {"down_proj": 3},
        "use_rslora": True,
    },
    "one layer": {"target_modules": ["k_proj", "gate_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["up_proj", "layers.0.self_attn.o_proj"]},
    "expression": {"target_modules": r".*\.0\.(self_attn\.v_proj|mlp\.up_proj)"},
    "head": {"target_modules": ["lm_head", "v_proj"]},
}
FUSED = {
    "falcon": {"target_modules": ["query_key_value", "dense_4h_to_h"]},
    "gpt_neox": {"target_modules": ["query_key_value", "dense", "embed_out", "lm_head"], "rank_pattern": {"dense": 2}},
}


def trained_adapter(base: Path, folder: Path, seed: int = 0, **fields) -> torch.nn.Module:
    """An adapter with A and B of all kinds, saved as PEFT does."""
    torch.manual_seed(seed)
    config = PeftConfig(**{"r": 4, "lora_alpha": 10, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"} | fields)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("case", [*ADAPTERS, *FUSED])
@torch.no_grad()
def test_an_adapter_of_peft_computes_the_same_here(bases, tmp_path, case):
    base = bases[case if case in FUSED else "llama"]
    theirs = trained_adapter(base, tmp_path / "peft", **{**ADAPTERS, **FUSED}[case])
    settings = export.from_peft(tmp_path / "peft", base, tmp_path / "out")
    ours, _ = finetuned_model.load_finetuned(base, tmp_path / "out" / LORA, "lora")
    idx = tokens()
    assert off(ours(idx), theirs(idx).logits) < 1e-5
    assert off(ours(idx), load_model(base)(idx)) > 1e-3
    assert settings.dropout == 0.1 and (case not in ("all linear", "head") or (settings.r, settings.alpha) == (4, 10))


def test_what_an_adapter_leaves_out_never_trains(bases, tmp_path):
    """Ranks that it has not, and projections and layers that it does not adapt: zero, and zero after training."""
    fields = {"target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"v_proj": 2}}
    trained_adapter(bases["llama"], tmp_path / "peft", layers_to_transform=[1], **fields)
    export.from_peft(tmp_path / "peft", bases["llama"], tmp_path / "out")
    model, _ = finetuned_model.load_finetuned(bases["llama"], tmp_path / "out" / LORA, "lora")
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(tokens(1)).float().logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        if name in before:
            assert not parameter[before[name] == 0].any(), name
            assert name.startswith("h.0") or "gate_up" in name or not torch.equal(parameter, before[name])


def test_an_old_file_and_one_not_trained(bases, tmp_path):
    """adapter_model.bin, in bfloat16, B zero."""
    trained_adapter(bases["falcon"], tmp_path / "peft", target_modules=["query_key_value"])
    tensors = load_file(tmp_path / "peft" / peft.TENSORS)
    (tmp_path / "peft" / peft.TENSORS).unlink()
    tensors = {k: (t * ("lora_A" in k)).bfloat16() for k, t in tensors.items()}
    torch.save(tensors, tmp_path / "peft" / peft.OLD_TENSORS)
    settings = export.from_peft(tmp_path / "peft", bases["falcon"], tmp_path / "out")
    assert settings.query and settings.key and settings.value and not settings.mlp
    assert all(t.any() for name, t in torch.load(tmp_path / "out" / LORA)["state"].items() if name.endswith("lora_A"))


REFUSED = {
    "dora": ({"use_dora": True}, ["lora_magnitude_vector it holds None", "use_dora"]),
    "modules": ({"modules_to_save": ["lm_head"]}, ["'modules_to_save': [\"lm_head\"]"]),
    "bias": ({"bias": "all"}, ["'bias': \"all\""]),
    "transposed": ({"fan_in_fan_out": True}, ["'fan_in_fan_out'"]),
    "changed base": ({"init_lora_weights": "pissa"}, ["'init_lora_weights': \"pissa\"", "base's weights"]),
    "kind": ({"peft_type": "IA3"}, ["'peft_type': \"IA3\"", "expected LORA"]),
    "task": ({"task_type": "SEQ_CLS"}, ["'task_type'", "CAUSAL_LM"]),
    "of the future": ({"use_new_thing": 3}, ["'use_new_thing': 3", "not supported"]),
    "tokens": ({"trainable_token_indices": [1]}, ["'trainable_token_indices'"]),
    "rank": ({"r": 8}, ["states rank 8", "4 rows"]),
    "no rank": ({"r": 0}, ["'r': 0", "above 0"]),
    "other targets": ({"target_modules": ["q_proj"]}, ["does not target", "v_proj"]),
    "more targets": ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, ["lacks A and B of", "o_proj"]),
    "other layers": ({"layers_to_transform": [0]}, ["does not target model.layers.1"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_by_name(cli, bases, tmp_path, case):
    change, words = REFUSED[case]
    trained_adapter(bases["llama"], tmp_path / "peft", target_modules=["q_proj", "v_proj"])
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    result = cli(IMPORT, checkpoint_dir=bases["llama"], peft_dir=tmp_path / "peft", out_dir=tmp_path / "out")
    result.refused("peft", *words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["peft"]


def test_tensors_that_do_not_belong(cli, bases, tmp_path):
    trained_adapter(bases["llama"], tmp_path / "peft", target_modules=["q_proj", "v_proj"])
    path, flags = tmp_path / "peft" / peft.TENSORS, {"peft_dir": tmp_path / "peft", "out_dir": tmp_path / "out"}
    whole = load_file(path)
    prefix = peft.PREFIX + "model.layers.0.self_attn.q_proj"
    for change, words in (
        ({f"{prefix}.lora_magnitude_vector": torch.ones(64)}, ["lora_magnitude_vector", "no A or B"]),
        ({peft.PREFIX + "lm_head.weight": torch.ones(320, 64)}, ["changes the base's lm_head.weight"]),
        ({f"{prefix}.lora_B.weight": torch.ones(64, 5)}, ["q_proj", "B (64, 5)"]),
        ({f"{prefix}.lora_B.weight": torch.ones(60, 4)}, ["q_proj", "(60, 4)"]),
    ):
        save_file(whole | change, path)
        cli(IMPORT, checkpoint_dir=bases["llama"], **flags).refused(*words)
    path.write_bytes(b"nothing")
    cli(IMPORT, checkpoint_dir=bases["llama"], **flags).refused(peft.TENSORS, "not a readable")
    save_file(whole, path)
    cli(IMPORT, checkpoint_dir=bases["falcon"], **flags).refused("model.layers.0", "no such layer")
    cli(IMPORT, checkpoint_dir=bases["llama"]).refused("--peft_dir", code=2)
    for lacking in (peft.TENSORS, "adapter_config.json"):
        (tmp_path / "peft" / lacking).unlink()
        cli(IMPORT, checkpoint_dir=bases["llama"], **flags).refused("no adapter; expected", "adapter_config.json")
    assert not (tmp_path / "out").exists()


def test_an_adapters_own_template_and_targets_that_name_nothing(cli, bases, tmp_path):
    trained_adapter(bases["llama"], tmp_path / "peft", target_modules=["v_proj", "c_attn"])
    tokenizer = AutoTokenizer.from_pretrained(bases["llama"])
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "peft")
    flags = {"peft_dir": tmp_path / "peft", "out_dir": tmp_path / "out"}
    result = cli(IMPORT, checkpoint_dir=bases["llama"], **flags)
    assert result.code == 0 and "the model has no c_attn" in result.out and "--lora_r 4" in result.out, result.err
    assert torch.load(tmp_path / "out" / LORA)["prompt_style"]["template"] == tokenizer.chat_template
    answer = {"lora_path": tmp_path / "out" / LORA, "prompt": "a", "max_new_tokens": 2}
    assert cli("generate/lora.py", checkpoint_dir=bases["llama"], **answer).code == 0


# --- the gate

WRONG = ["tensor transposed", "scaling forgotten", "template lost", "tokenizer swapped"]
KINDS = ["hf", "peft", "gguf", "merged"]


O_PROJ = ("model.layers.0.self_attn.o_proj", "blk.0.attn_output")  # square: transposed, it fits


def turned(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.T if name.removesuffix(".weight") in O_PROJ else tensor


def spoil(patch: pytest.MonkeyPatch, how: str, base: Path) -> None:
    """Have the writer of each kind make one mistake."""
    shards, merged, encoded = hf_shards.write_shards, lora.LoRALinear.merged, writer.encoded
    to_peft, adapter_config, side_files = peft.to_peft, peft.adapter_config, hf.copy_side_files

    def on_shards(change) -> None:
        patch.setattr(hf, "write_shards", lambda d, tensors, n: shards(d, ((k, change(k, t)) for k, t in tensors), n))

    if how == "tensor transposed":
        on_shards(turned)
        patch.setattr(writer, "encoded", lambda t, kind, name: encoded(turned(name, t), kind, name))
        patch.setattr(
            lora.LoRALinear, "merged", lambda x, d: merged(x, d).T if x.in_features == x.out_features else merged(x, d)
        )
        pairs = {O_PROJ[0]: lambda A, B: (B.T, A.T)}
        same = lambda A, B: (A, B)  # noqa: E731
        patch.setattr(peft, "to_peft", lambda *a: {k: pairs.get(k, same)(*v) for k, v in to_peft(*a).items()})
    elif how == "scaling forgotten":

        def unscaled(layer, dtype):
            layer.scale = 1.0
            return merged(layer, dtype)

        patch.setattr(lora.LoRALinear, "merged", unscaled)
        patch.setattr(peft, "adapter_config", lambda *a: (c := adapter_config(*a)) | {"lora_alpha": c["r"]})
        # what has no scale: the order of rotated rows, and norms twice as large
        patch.setattr(gguf_layout, "neighbors_apart", lambda rotated, head_size: tuple(range(head_size)))
        on_shards(lambda name, tensor: tensor * 2 if "norm" in name else tensor)
    elif how == "template lost":
        for name, nothing in (("write_template", None), ("save", None), ("for_others", "")):
            patch.setattr(PromptStyle, name, lambda *a, nothing=nothing: nothing)
    else:
        other, fields = base.parent / "other", writer.vocabulary_fields

        def swapped(source, target, *names):
            side_files(source, target, *names)
            shutil.copyfile(other / "tokenizer.json", target / "tokenizer.json")

        patch.setattr(hf, "copy_side_files", swapped)
        patch.setattr(writer, "vocabulary_fields", lambda folder, *a: fields(other, *a))


def other_tokenizer(base: Path, folder: Path) -> None:
    """The same tokens, two of them with each other's id."""
    shutil.copytree(base, folder)
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_text())
    vocab = fields["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_export_is_refused(cli, bases, tmp_path, monkeypatch, kind, how):
    base = tmp_path / "base"
    shutil.copytree(bases["llama"], base)
    other_tokenizer(base, tmp_path / "other")
    flags = {"checkpoint_dir": finetuned(base, tmp_path), "out_dir": tmp_path / "out"}
    if kind in ("peft", "merged"):
        flags |= {"lora_path": lora_file(base, tmp_path / "run"), "checkpoint_dir": base}
    if kind == "gguf":
        flags["format"] = "gguf"
    (tmp_path / "out").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        spoil(patch, how, base)
        result = cli(MERGE if kind == "merged" else EXPORT, **flags)
    result.refused("nothing was written")
    assert sorted(tmp_path.rglob("*")) == before
    right = cli(MERGE if kind == "merged" else EXPORT, **flags)
    assert right.code == 0 and "its logits differ" in right.out, right.err
    figures = json.loads((tmp_path / "out" / "export.json").read_text())
    assert figures["logits_difference"] <= 1e-5 and figures["texts_compared"] == 4
    assert figures["conversations_compared"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_where_no_other_reader_is_installed(cli, bases, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(readers, "missing", lambda *packages: list(packages))
    flags = {"checkpoint_dir": finetuned(bases["llama"], tmp_path), "out_dir": tmp_path / "out"}
    if kind in ("peft", "merged"):
        flags |= {"lora_path": lora_file(bases["llama"], tmp_path / "run"), "checkpoint_dir": bases["llama"]}
    if kind == "gguf":
        flags["format"] = "gguf"
    result = cli(MERGE if kind == "merged" else EXPORT, **flags)
    assert result.code == 0 and result.out.count("not installed; read back by Lit-GPT itself") == 1, result.err
    assert json.loads((tmp_path / "out" / "export.json").read_text())["reader"] == "Lit-GPT"
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(PromptStyle, "for_others", lambda *a: "lost")
    monkeypatch.setattr(lora.LoRALinear, "merged", lambda layer, dtype: layer.linear.weight)
    cli(MERGE if kind == "merged" else EXPORT, **flags).refused("read back by Lit-GPT", "nothing was written")


@pytest.mark.subprocess
def test_killed_before_it_is_put_in_place(cli, bases, tmp_path):
    """SIGKILL when all is written and compared: no folder, and the same command then starts over."""
    flags = {"checkpoint_dir": bases["llama"], "out_dir": tmp_path / "out"}
    code = (
        "import os, runpy, sys\nfrom lit_gpt.conversion import model_card\n"
        "model_card.write = lambda *a, **k: os.kill(os.getpid(), 9)\n"
        "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    )
    argv = [sys.executable, "-c", code, ROOT / EXPORT, *(f"--{name}={value}" for name, value in flags.items())]
    assert subprocess.run(argv, capture_output=True).returncode == -signal.SIGKILL
    assert any((tmp_path / ".out.tmp").iterdir()) and not (tmp_path / "out").exists()
    assert cli(EXPORT, **flags).code == 0
    assert (tmp_path / "out" / "export.json").is_file() and not (tmp_path / ".out.tmp").exists()


def test_damaged_files_beside_the_weights(cli, bases, tmp_path):
    """Of the source: each is named in one line, and nothing is written."""
    for name, text, words in (
        ("prompt_style.json", b"{", "expected JSON"),
        ("prompt_style.json", b"{}", "expected what a finetune leaves"),
        ("generation_config.json", b"[]", "expected a JSON object"),
        ("tokenizer_config.json", b"{", "expected JSON"),
        ("chat_template.jinja", b"\xff", "expected UTF-8 text"),
        ("tokenizer.json", b"{}", "expected a tokenizer"),
        ("config.json", b"{", "not a readable JSON file"),
    ):
        base = tmp_path / "base"
        shutil.copytree(bases["llama"], base)
        (base / name).write_bytes(text)
        cli(EXPORT, checkpoint_dir=base, out_dir=tmp_path / "out").refused(name, words)
        shutil.rmtree(base)
        assert not list(tmp_path.iterdir())


def test_a_card_in_another_encoding_does_not_end_an_export(bases, tmp_path):
    shutil.copytree(bases["llama"], tmp_path / "base")
    (tmp_path / "base" / "README.md").write_bytes(b"---\nlicense: mit\n---\nGr\xfc\xdfe")
    export.to_hf(tmp_path / "base", tmp_path / "out")
    assert 'license: "mit"' in (tmp_path / "out" / "README.md").read_text()


def test_flags_that_do_not_go_together(cli, bases, tmp_path):
    flags = {"checkpoint_dir": bases["llama"], "out_dir": tmp_path / "out"}
    cli(EXPORT, **flags, lora_path="x.pth", format="gguf").refused("--finetuned_path", "merge_lora.py", code=2)
    cli(EXPORT, **flags, dtype="q8_0").refused("--dtype q8_0", "--format gguf", code=2)
    for dtype in ("fp16", "f16"):  # llama.cpp's spelling is taken, too
        cli(EXPORT, **flags, lora_path="x.pth", dtype=dtype).refused("--dtype fp16", code=2)


def test_the_template_and_end_tokens_of_a_finetune_go_along(bases, tmp_path):
    """transformers renders the finetune's own prompt, with the BOS that the tokenizer adds to it here."""
    folder = finetuned(bases["llama"], tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    backend.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"bos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    style = replace(PromptStyle.from_name("alpaca", Tokenizer(folder)), stop_ids=(0, 7))
    style.save(folder)
    export.to_hf(folder, tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for messages in parity.CONVERSATIONS:
        found = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert found == style.encode_prompt(messages, Tokenizer(folder)) and len(found) > 20
        assert found[0] == 0 and 0 not in found[1:2]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").generation_config.eos_token_id[:2] == [0, 7]


# --- what goes along, and what comes of it


def test_card_figures_and_further_finetuning(cli, bases, tmp_path, monkeypatch):
    base = tmp_path / "checkpoints" / "owner" / "name"
    shutil.copytree(bases["llama"], base)
    (base / "README.md").write_text("---\nlanguage: en\nlicense: llama3.2\n---\n# A model\n")
    rows = [{"instruction": f"Say {word}", "output": word} for word in ("cat", "dog", "cow", "hen") * 5]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = {"json_path": tmp_path / "rows.json", "destination_path": tmp_path / "data", "validation_fraction": 0.2}
    assert cli("scripts/prepare_json.py", checkpoint_dir=base, **data).code == 0
    run = {"checkpoint_dir": base, "data_dir": tmp_path / "data", "batch_size": 4, "warmup_steps": 0}
    run |= {"precision": "fp32", "sample_tokens": 0, "lora_mlp": "true", "learning_rate": 0.01}
    assert cli("finetune/lora.py", **run, max_steps=3, out_dir=tmp_path / "run").code == 0
    flags = {"checkpoint_dir": base, "lora_path": tmp_path / "run" / LORA}
    assert cli(EXPORT, **flags, out_dir=tmp_path / "peft").code == 0
    assert cli(MERGE, **flags, out_dir=tmp_path / "merged").code == 0
    assert cli(EXPORT, checkpoint_dir=tmp_path / "merged", out_dir=tmp_path / "hf").code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for folder in ("peft", "merged", "hf"):
        card = (tmp_path / folder / "README.md").read_text()
        assert 'license: "llama3.2"' in card and 'base_model: "owner/name"' in card and "![loss" in card
        assert "| lora_mlp | True |" in card and f"| val_loss_last | {summary['val_loss_last']} |" in card
        assert "| max_steps | 3 |" in card and "| epochs |" not in card
        assert "| train: rows_kept | 16 |" in card and (tmp_path / folder / "loss.png").is_file()
        figures = json.loads((tmp_path / folder / "export.json").read_text())
        assert figures["tokenizer"] == Tokenizer(base).fingerprint and len(figures["template"]) == 64
        assert figures["base"] and all(figures["sha256"].values()) and figures["versions"]["transformers"]
    assert len(json.loads((tmp_path / "peft" / "export.json").read_text())["adapter"]) == 64

    # the code on the card loads what it is the card of, from beside its folder
    for folder in ("merged", "hf"):
        code = (tmp_path / folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
        names: dict = {}
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            exec(code, names)
        assert isinstance(names["model"], torch.nn.Module)

    # the adapter, there and back, goes on where it was
    back = {"peft_dir": tmp_path / "peft", "out_dir": tmp_path / "back", "checkpoint_dir": base}
    assert cli(IMPORT, **back).code == 0
    more = run | {"lora_path": tmp_path / "back" / LORA, "max_steps": 2, "out_dir": tmp_path / "more"}
    assert cli("finetune/lora.py", **more).code == 0
    again = json.loads((tmp_path / "more" / "summary.json").read_text())
    assert again["val_loss_first"] == pytest.approx(summary["val_loss_last"], abs=1e-5)
    other = {"out_dir": tmp_path / "other", "lora_r": 4}
    cli("finetune/lora.py", **more | other).refused("--lora_r 4", "has --lora_r 8", code=2)


def test_a_wrong_scale_shows_behind_rounding(cli, bases, tmp_path, monkeypatch):
    """A merge into bfloat16 of a finetune that moves the logits by less than bfloat16 may."""
    base = tmp_path / "base"
    shutil.copytree(bases["llama"], base)
    hf.convert(base, hf_shards.StoredWeights(base), torch.bfloat16)
    path = lora_file(base, tmp_path / "run", replace(EVERYTHING, alpha=0.4))
    flags = {"checkpoint_dir": base, "lora_path": path}
    merged = cli(MERGE, **flags, out_dir=tmp_path / "right")
    figures = json.loads((tmp_path / "right" / "export.json").read_text())
    assert merged.code == 0 and figures["finetune_arrived"] == pytest.approx(1, abs=0.05), merged.err
    plain = lora.LoRALinear.merged

    def halved(layer, dtype):
        layer.scale *= 0.5
        return plain(layer, dtype)

    monkeypatch.setattr(lora.LoRALinear, "merged", halved)
    cli(MERGE, **flags, out_dir=tmp_path / "wrong").refused("of the finetune's change of the logits arrived")
    assert not (tmp_path / "wrong").exists()


@torch.no_grad()
def test_gate_catches_nan(bases):
    model = load_model(bases["llama"])
    golden = parity.Reference.compute(readers.LitReader.open(bases["llama"], model))
    model.ln_f.weight[0] = float("nan")
    with pytest.raises(UserError, match="nan of their norm"):
        golden.compare(readers.LitReader.open(bases["llama"], model), "it")
