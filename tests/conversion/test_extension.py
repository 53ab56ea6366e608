"""scripts/extend.py: longer contexts and new tokens, from the base to what leaves; transformers reads each the same."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.compare import off
from helpers.rows import write_rows
from helpers.tiny_models import make_base, model_of
from helpers.tokenizers import sentencepiece_model
from lit_gpt import Tokenizer
from lit_gpt.checkpoints import io
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.conversion import extension
from lit_gpt.model.config import Config

EXTEND = "scripts/extend.py"
CALL = ["<call>", "</call>"]


@torch.no_grad()
@pytest.mark.parametrize("older", [False, True])
def test_positions_are_divided_by_the_factor(tmp_path, older):
    """By transformers and by ours, from either spelling of config.json; a second time from where it stands."""
    base = make_base(tmp_path / "base", "llama", "smollm2")
    if older:
        path = base / "config.json"
        fields = json.loads(path.read_text())
        fields["rope_theta"] = fields.pop("rope_parameters")["rope_theta"]
        path.write_text(json.dumps(fields))
    config = extension.extend(base, tmp_path / "a", 2, [])
    assert config.block_size == 512 and config.rope_scaling == {"rope_type": "linear", "factor": 2}
    config = extension.extend(tmp_path / "a", tmp_path / "b", 1.5, [])
    assert config.block_size == 768 and config.rope_scaling["factor"] == 3
    idx, model = torch.arange(1, 300).unsqueeze(0), load_model(tmp_path / "b")
    logits = model(idx)
    shutil.copytree(tmp_path / "b", tmp_path / "hf")
    plain = load_model(base)
    plain.rope.frequencies = plain.rope.frequencies / 3
    assert off(logits, plain(idx)) < 1e-6
    assert off(logits[:, 0], load_model(base)(idx)[:, 0]) < 1e-6 < off(logits, load_model(base)(idx))


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (("gpt2", "gpt2"), "gpt2 has no rotary positions"),
        (("mpt", "mpt"), "mpt has no rotary positions"),
        (("llama", "llama3"), "stretches its context already, by llama3"),
    ],
)
def test_contexts_that_cannot_be_stretched_are_refused(cli, tmp_path, layout, words):
    model_of(*layout, tmp_path / layout[1])
    flags = {"checkpoint_dir": tmp_path / layout[1], "out_dir": tmp_path / "out", "context_factor": 4}
    cli(EXTEND, **flags).refused("--context_factor 4", words)
    assert not (tmp_path / "out").exists()


@torch.no_grad()
@pytest.mark.parametrize("layout", [("llama", "llama3"), ("llama", "smollm2"), ("gpt_neox", "pythia")], ids="-".join)
def test_new_tokens_are_single_and_begin_as_the_mean(tmp_path, layout):
    """Within the rows that the embedding has, and beyond; transformers gives them the same ids."""
    base = make_base(tmp_path / "base", *layout)
    known = Tokenizer(base).vocab_size
    tokens = CALL + [f"<t{i}>" for i in range(320 - known)]
    config = extension.extend(base, tmp_path / "out", 1, tokens)
    assert config.padded_vocab_size == 322 and Config.from_checkpoint(base).padded_vocab_size == 320
    ours, theirs = Tokenizer(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the <call>cat</call> and<t7> a"
    assert ours.encode(text).tolist() == theirs(text).input_ids
    assert ours.token_id("<call>") == known and theirs.decode([known, 321], skip_special_tokens=True) == ""
    old, new = (io.load(folder / "lit_model.pth") for folder in (base, tmp_path / "out"))
    for name in ("wte.weight", "lm_head.weight"):
        if name in old:
            mean = old[name][:known].mean(0)
            assert torch.equal(new[name][:known], old[name][:known])
            assert all(off(row, mean) < 1e-6 for row in new[name][known:])
    idx = torch.arange(20).unsqueeze(0)
    logits, before = (load_model(folder)(idx)[..., :known] for folder in (tmp_path / "out", base))
    assert off(logits, before) < 1e-6


def test_new_tokens_of_a_sentencepiece_model(tmp_path):
    """Which has no file that they could be written into: the settings name them."""
    base = make_base(tmp_path / "base", vocab_size=430)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (base / name).unlink(missing_ok=True)
    (base / "tokenizer.model").write_bytes(sentencepiece_model())
    extension.extend(base, tmp_path / "out", 1, CALL)
    before, after = Tokenizer(base), Tokenizer(tmp_path / "out")
    ids = after.encode("the <call>cat", bos=False).tolist()
    assert before.vocab_size in ids and after.vocab_size == before.vocab_size + 2
    assert after.encode("the cat").tolist() == before.encode("the cat").tolist()


def test_tokens_that_cannot_be_added_are_refused(cli, tmp_path):
    flags = {"checkpoint_dir": make_base(tmp_path / "base"), "out_dir": tmp_path / "out"}
    cli(EXTEND, **flags).refused("--context_factor 1", "--add_tokens", code=2)
    cli(EXTEND, "--add_tokens", "<|end|>", **flags).refused("--add_tokens '<|end|>'", "already", code=2)
    cli(EXTEND, "--add_tokens", "<a>", "<a>", **flags).refused("--add_tokens '<a>'", "double", code=2)
    assert not (tmp_path / "out").exists()


def test_from_an_extended_base_to_what_leaves(cli, tmp_path, flags):
    """Data with the new tokens, longer than the base's context; LoRA with all of LongLoRA; merged; by transformers."""
    base, place = make_base(tmp_path / "base", "llama", "smollm2"), tmp_path / "long"
    result = cli(EXTEND, "--add_tokens", *CALL, checkpoint_dir=base, out_dir=place, context_factor=2)
    assert result.code == 0 and "a context of 512, and 320 tokens" in result.out, result.err
    rows = [{"instruction": f"call {i}", "output": "<call>" + " the cat" * 80 * (i % 2) + "</call>"} for i in range(20)]
    write_rows(tmp_path / "rows.jsonl", rows)
    data = {"json_path": tmp_path / "rows.jsonl", "destination_path": tmp_path / "data", "prompt_style": "alpaca"}
    result = cli("scripts/prepare_json.py", checkpoint_dir=place, **data, validation_fraction=0.2)
    assert result.code == 0, result.err
    flags |= {"checkpoint_dir": place, "data_dir": tmp_path / "data", "max_steps": 3, "attention_group": 64}
    flags |= {"train_norms": "true", "train_embeddings": "both", "sample_tokens": 3}
    assert (result := cli("finetune/lora.py", **flags)).code == 0, result.err
    own = {"finetuned_path": flags["out_dir"] / "lit_model_lora_finetuned.pth"}
    cli("generate/lora.py", checkpoint_dir=base, **own, prompt="a").refused("trained on another base")
    assert cli("generate/lora.py", checkpoint_dir=place, **own, prompt="a", max_new_tokens=3).code == 0
    merged = tmp_path / "merged"
    assert (result := cli("scripts/merge_lora.py", checkpoint_dir=place, **own, out_dir=merged)).code == 0, result.err
    config = Config.from_checkpoint(merged)
    assert config.block_size == 512 and config.rope_scaling["factor"] == 2
    assert not torch.equal(
        io.load(merged / "lit_model.pth")["wte.weight"], io.load(place / "lit_model.pth")["wte.weight"]
    )
    result = cli("scripts/convert_lit_checkpoint.py", checkpoint_dir=merged, out_dir=tmp_path / "hf")
    assert result.code == 0, result.err
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    idx = torch.arange(1, 310).unsqueeze(0)
    with torch.no_grad():
        assert off(theirs(idx).logits, load_model(merged)(idx)) < 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("<call>").input_ids == [Tokenizer(base).vocab_size]
