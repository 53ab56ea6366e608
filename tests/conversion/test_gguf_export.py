"""GGUF files written here, read back by the gguf package, by transformers, by our own reader and by llama.cpp."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import sentencepiece
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM

from helpers.compare import off
from helpers.exports import EXPORT
from helpers.gguf_files import (
    PLAIN,
    SPLITS,
    byte_level,
    byte_level_fields,
    gguf_tensors,
    model_fields,
    sentencepiece_fields,
    sentencepiece_proto,
    tiny,
    write_gguf,
)
from helpers.gguf_layouts import FURTHER, LATENT_TOO, LAYOUTS, NAMES, READ_BY_TRANSFORMERS, RECURRENT, make
from helpers.llama_cpp import LlamaCpp
from helpers.paths import SHARED
from helpers.tiny_models import make_base
from lit_gpt import Tokenizer
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.conversion import export, hf, hf_shards, readers
from lit_gpt.conversion.gguf import importer, writer
from lit_gpt.conversion.gguf.layout import layout_of
from lit_gpt.conversion.gguf.reader import GGUFFile
from lit_gpt.conversion.gguf.tokenizer import Vocabulary, build_tokenizer
from lit_gpt.errors import UserError
from lit_gpt.generation.engine import generate
from lit_gpt.model.config import Config
from lit_gpt.text.prompt_style import PromptStyle

TOOL = SHARED / "tools" / "make_smollm2.py"


def tokens(folder: Path) -> torch.Tensor:
    """Ids to compare logits on, within the window if there is one."""
    config = load_model(folder).config
    length = 40 if config.family in ("gemma", "gemma4") else config.sliding_window or 40
    return torch.randint(320, (2, length), generator=torch.Generator().manual_seed(3))


def only_file(folder: Path) -> Path:
    (path,) = folder.glob("*.gguf")
    return path


@pytest.mark.parametrize(("family", "layout"), LAYOUTS + FURTHER, ids=NAMES)
def test_out_and_in_again_is_bit_identical(tmp_path, family, layout):
    """All but what the file has another number of, which rounds it: norms' weights plus 1, and a recurrence's decay
    for its logarithm. Where the file has products of weights and factors, they are the model's, whose factors are 1."""
    folder = make(tmp_path / "base", family, layout)
    state, config = torch.load(folder / "lit_model.pth"), Config.from_checkpoint(folder)
    written = writer.write(tmp_path / "a.gguf", folder, state, "fp32", None)
    found = importer.convert(tmp_path / "a.gguf", tmp_path / "in", torch.float32)
    back = torch.load(tmp_path / "in" / "lit_model.pth")
    assert back.keys() == state.keys()
    assert found.family == (config.family if config.family != "glm4_moe_lite" else "deepseek")
    readers.check_same(found, replace(config, **written.folded), tmp_path / "a.gguf")
    if written.folded:
        idx = tokens(folder)
        assert off(load_model(tmp_path / "in")(idx), load_model(folder)(idx)) < 1e-5
        writer.write(tmp_path / "b.gguf", tmp_path / "in", back, "fp32", None)
        first, second = (GGUFFile(tmp_path / name) for name in ("a.gguf", "b.gguf"))
        assert all(off(first.read(name), second.read(name)) < 1e-7 for name in first.tensors)
        return
    for name, tensor in state.items():
        rounds = name.endswith("A_log") or written.norm_offset and ("norm" in name or name == "ln_f.weight")
        limit = 1e-7 * tensor.abs().max().clamp(min=1) if rounds else 0
        assert (tensor - back[name]).abs().max() <= limit, name


@pytest.mark.parametrize(("family", "layout"), RECURRENT + LATENT_TOO)
@torch.no_grad()
def test_what_came_in_goes_out_to_transformers(tmp_path, family, layout):
    """The config.json that is made of the metadata says to transformers what it says here."""
    folder = make(tmp_path / "base", family, layout)
    writer.write(tmp_path / "a.gguf", folder, torch.load(folder / "lit_model.pth"), "fp32", None)
    importer.convert(tmp_path / "a.gguf", tmp_path / "in", torch.float32)
    hf.export(tmp_path / "in", tmp_path / "hf", torch.load(tmp_path / "in" / "lit_model.pth"))
    theirs, idx = AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), tokens(folder)
    assert off(theirs(idx).logits, load_model(folder)(idx)) < 1e-5


FULLY = LAYOUTS + [names for names in FURTHER if names[1] in READ_BY_TRANSFORMERS]


@pytest.mark.parametrize(("family", "layout"), FULLY, ids=["-".join(names) for names in FULLY])
@torch.no_grad()
def test_the_file_holds_the_model(tmp_path, monkeypatch, family, layout):
    """float32: what the gguf package reads, under its own names, are the tensors of transformers, rotations apart; and
    the logits of who reads the whole are those of the source."""
    folder = make(tmp_path / "base", family, layout)
    if layout == "phi3":  # its padding id is beyond so few rows
        monkeypatch.setattr(readers, "missing", lambda *packages: list(packages))
    found = export.to_gguf(folder, tmp_path / "out", "fp32")
    assert found["reader"] == ("transformers" if layout in READ_BY_TRANSFORMERS else "Lit-GPT")
    path, idx = only_file(tmp_path / "out"), tokens(folder)
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(path).tensors}
    source = hf_shards.StoredWeights(folder)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name in source if family == "llama" else ():
        if "q_proj" not in name and "k_proj" not in name:
            assert torch.equal(stored[names.get_name(name, (".weight", ".bias"))], source[name]), name
    expected = load_model(folder)(idx)
    own = readers.own_gguf(path, load_model(folder).config, torch.float32)
    assert off(own.logits(idx), expected) < 1e-6
    if layout in READ_BY_TRANSFORMERS:
        theirs = readers.read_gguf(path, folder, torch.float32)
        assert torch.equal(theirs.logits(idx), AutoModelForCausalLM.from_pretrained(folder)(idx).logits)


@pytest.mark.parametrize(("dtype", "limit"), [("fp16", 1e-3), ("bf16", 1e-2), ("q8_0", 3e-2)])
@torch.no_grad()
def test_rounded(tmp_path, dtype, limit):
    """Matrices are what the gguf package rounds them to; rows that do not divide into blocks are float16."""
    folder = make_base(tmp_path / "base", "llama", "llama", num_hidden_layers=1)
    export.to_gguf(folder, tmp_path / "out", dtype)
    path, idx = only_file(tmp_path / "out"), tokens(folder)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=path.name)
    assert 1e-6 < off(theirs(idx).logits, load_model(folder)(idx)) < limit
    source, file, kind = hf_shards.StoredWeights(folder), gguf.GGUFReader(path), writer.KINDS[dtype]
    for tensor in file.tensors:
        if len(tensor.shape) == 1:
            assert tensor.tensor_type == Kind.F32
        if tensor.name == "blk.0.ffn_down.weight":  # rows of 112: no blocks of 32
            assert tensor.tensor_type == (Kind.F16 if dtype == "q8_0" else kind)
        if tensor.name == "blk.0.ffn_up.weight":
            expected = dequantize(quantize(source["model.layers.0.mlp.up_proj.weight"].numpy(), kind), kind)
            assert tensor.tensor_type == kind and (dequantize(tensor.data, kind) == expected).all()
    assert file.fields["general.file_type"].contents() == {"fp16": 1, "bf16": 32, "q8_0": 7}[dtype]


def converted(tmp_path: Path, vocabulary: dict) -> Path:
    """A checkpoint folder made from a GGUF file with these fields."""
    model = tiny()
    fields = model_fields(model.config) | vocabulary
    importer.convert(
        write_gguf(tmp_path / "a.gguf", fields, gguf_tensors(model, Kind.F32)), tmp_path / "c", torch.float32
    )
    return tmp_path / "c"


@pytest.mark.parametrize("pre", list(SPLITS))
def test_a_file_written_again_says_the_same(tmp_path, pre):
    """GGUF to a folder and back: all metadata that is read, and the tensors, bit for bit."""
    vocabulary = byte_level_fields(byte_level(pre), pre)
    folder = converted(tmp_path, vocabulary)
    export.to_gguf(folder, tmp_path / "out", None)
    before, after = GGUFFile(tmp_path / "a.gguf"), GGUFFile(only_file(tmp_path / "out"))
    n = len(vocabulary["tokenizer.ggml.tokens"])
    for key, value in before.fields.items():
        found = after.fields.get(key, 0 if key == "llama.expert_count" else None)
        assert (found[:n] if key.endswith((".tokens", ".token_type")) else found) == value, key
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.tensors)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(tmp_path, prefix):
    """Scores made of ranks split as those of the model do."""
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_proto())
    given = sentencepiece_fields(model) | {"tokenizer.ggml.add_space_prefix": prefix}
    folder = converted(tmp_path, given)
    export.to_gguf(folder, tmp_path / "out", None)
    before, after = GGUFFile(tmp_path / "a.gguf"), GGUFFile(only_file(tmp_path / "out"))
    old, new = (build_tokenizer(file, Vocabulary(file)) for file in (before, after))
    assert all(old.encode(text).ids == new.encode(text).ids for text in [*PLAIN, "<|im|>Hello</s> a<tool>b"])
    n = model.get_piece_size()
    for key in ("tokens", "token_type"):
        assert after.fields[f"tokenizer.ggml.{key}"][:n] == before.fields[f"tokenizer.ggml.{key}"]
    assert after.fields["tokenizer.ggml.unknown_token_id"] == 0


def edit(path: Path, change) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


REFUSED = {
    "a family without a layout": (("gpt_neox", "tied"), None, ["gptneox has a head of its own"]),
    "windows elsewhere": (("gemma", "gemma3"), None, ["gemma3 has no window in each 6th layer"]),
    "other scores": (("gemma", "gemma2"), None, ["gemma2 ties its head, and scales scores"]),
    "a rotary scaling": (("phi3", "longrope"), None, ["rotary scaling with", "llama.cpp"]),
    "a family without a layout at all": (
        ("apertus", "apertus"),
        None,
        ["the apertus family has no layout of llama.cpp"],
    ),
    "biases": (("falcon", "multi-head"), None, ["neither ALiBi, biases"]),
    "activation": (
        ("llama", "llama"),
        lambda d: edit(d / "lit_config.json", lambda c: c.update(activation="gelu")),
        ["llama with silu, not gelu"],
    ),
    "splits": (
        ("llama", "llama"),
        lambda d: edit(d / "tokenizer.json", lambda t: t.update(pre_tokenizer={"type": "Whitespace"})),
        ["tokenizer.json: splits text", "smollm"],
    ),
    "normalizer": (
        ("llama", "llama"),
        lambda d: edit(d / "tokenizer.json", lambda t: t.update(normalizer={"type": "Lowercase"})),
        ["normalizer, Lowercase"],
    ),
    "more tokens than rows": (
        ("llama", "llama"),
        lambda d: edit(d / "tokenizer.json", lambda t: t["model"]["vocab"].update(zzz=400)),
        ["the id 400", "320 rows"],
    ),
    "no tokenizer": (("llama", "llama"), lambda d: (d / "tokenizer.json").unlink(), ["expected tokenizer.json"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_does_not_know_is_refused(cli, tmp_path, case):
    layout, spoil, words = REFUSED[case]
    folder = make_base(tmp_path / "base", *layout)
    if spoil:
        spoil(folder)
    cli(EXPORT, checkpoint_dir=folder, out_dir=tmp_path / "out", format="gguf").refused(*words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_a_family_without_a_layout_is_refused(tmp_path, monkeypatch):
    from lit_gpt.families import llama

    folder = make_base(tmp_path / "base")
    monkeypatch.delattr(llama, "gguf")
    with pytest.raises(UserError, match="the llama family has no layout of llama.cpp"):
        export.to_gguf(folder, tmp_path / "out", None)


def test_values_beyond_float16_are_refused(tmp_path):
    folder = make_base(tmp_path / "base")
    state = torch.load(folder / "lit_model.pth")
    state["h.0.mlp.proj.weight"][0, 0] = 1e5
    torch.save(state, folder / "lit_model.pth")
    with pytest.raises(UserError, match="blk.0.ffn_down.weight: holds values beyond float16"):
        export.to_gguf(folder, tmp_path / "out", "fp16")
    assert not (tmp_path / "out").exists()


def test_other_metadata_is_refused(tmp_path, monkeypatch):
    """The rotation's base of another model, which 24 tokens hardly show."""
    real = writer.metadata
    monkeypatch.setattr(writer, "metadata", lambda *a: real(*a) | {"llama.rope.freq_base": 10001.0})
    monkeypatch.setattr(readers, "missing", lambda *packages: list(packages))
    with pytest.raises(UserError, match="says rope_base 10001.0 for 10000.0"):
        export.to_gguf(make_base(tmp_path / "base", "llama", "llama"), tmp_path / "out", None)


def test_a_window_cuts_the_context(tmp_path, capsys):
    export.to_gguf(make_base(tmp_path / "base", "llama", "mistral"), tmp_path / "out", None)
    assert "the context is cut to 5 tokens" in capsys.readouterr().out
    assert GGUFFile(only_file(tmp_path / "out")).fields["llama.context_length"] == 5


# --- llama.cpp itself, where xllamacpp is installed


@pytest.mark.parametrize(("family", "layout"), LAYOUTS + FURTHER, ids=NAMES)
@torch.no_grad()
def test_llama_cpp_computes_the_same(tmp_path, family, layout):
    """The probabilities of the next token. Its GELU is the approximation by tanh, in a table of float16."""
    pytest.importorskip("xllamacpp")
    folder = make(tmp_path / "base", family, layout)
    state = torch.load(folder / "lit_model.pth")
    writer.write(tmp_path / "a.gguf", folder, state, "fp32", None)
    theirs, model = LlamaCpp(tmp_path / "a.gguf"), load_model(folder)
    window = None if layout_of(model.config).keeps_window else model.config.sliding_window
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        idx = torch.randint(3, 320, (1, (window or 40) - 1), generator=generator)
        if (found := theirs.logprobs(idx[0].tolist(), 320)) is not None:
            expected = model(idx)[0, -1].log_softmax(-1)
            tanh = family in ("falcon", "gpt_neox", "gpt2", "gpt_bigcode", "mpt")
            assert off(found, expected) < (2e-3 if tanh else 1e-3)
            return
    pytest.fail("the likeliest token ended the text each time")


@pytest.mark.parametrize("pre", list(SPLITS))
def test_llama_cpp_splits_texts_alike(tmp_path, pre):
    pytest.importorskip("xllamacpp")
    tokenizer = byte_level(pre)
    model = tiny(vocab_size=tokenizer.get_vocab_size())
    fields = model_fields(model.config) | byte_level_fields(tokenizer, pre)
    theirs = LlamaCpp(write_gguf(tmp_path / "a.gguf", fields, gguf_tensors(model, Kind.F32)))
    for text in PLAIN:
        if "\0" not in text:
            assert theirs.tokens(text) == tokenizer.encode(text).ids, text


@pytest.mark.parametrize(("family", "layout"), RECURRENT)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@torch.no_grad()
def test_llama_cpp_carries_the_same_state(tmp_path, family, layout, dtype):
    """Greedy tokens after a prompt, one by one; rounded weights are those of the file read back."""
    pytest.importorskip("xllamacpp")
    folder = make(tmp_path / "base", family, layout)
    writer.write(tmp_path / "a.gguf", folder, torch.load(folder / "lit_model.pth"), dtype, None)
    importer.convert(tmp_path / "a.gguf", tmp_path / "in", torch.float32)
    theirs, model = LlamaCpp(tmp_path / "a.gguf"), load_model(tmp_path / "in")
    ids = torch.randint(3, 320, (12,), generator=torch.Generator().manual_seed(5)).tolist()
    found = [each["id"] for each in theirs.complete(ids, 8, 1)["logprobs"]["content"]]
    ours = iter(generate(model, ids, 8, temperature=0))
    assert len(found) > 4 and all(token in ours for token in found)  # it leaves out bytes that make no character


@pytest.mark.subprocess
@pytest.mark.skipif(
    not (SHARED / "tools" / "make_smollm2.py").exists(), reason="the tool that makes the model is absent"
)
def test_llama_cpp_writes_the_same_text(tmp_path):
    """20 tokens of SmolLM2-135M, greedily, through its own rendering of the chat template."""
    pytest.importorskip("xllamacpp")
    folder = tmp_path / "SmolLM2-135M-Instruct"
    subprocess.run([sys.executable, TOOL, folder], check=True, capture_output=True)
    hf.convert(folder, hf_shards.StoredWeights(folder))
    export.to_gguf(folder, tmp_path / "out", "fp32")
    theirs = LlamaCpp(only_file(tmp_path / "out"))
    model, tokenizer = load_model(folder, torch.float32), Tokenizer(folder)
    style = PromptStyle.from_checkpoint(folder, tokenizer)
    for question in ("Name three colours.", "Why is the sky blue? 12345 🙂"):
        messages = [{"role": "user", "content": question}]
        ids = style.encode_prompt(messages, tokenizer)
        ours = tokenizer.decode(list(generate(model, ids, 20, temperature=0, stop_ids=style.stop_ids)))
        assert theirs.chat(messages, 20) == ours and len(ours) > 40
