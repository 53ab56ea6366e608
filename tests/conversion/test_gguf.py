"""GGUF files, written here as llama.cpp writes them, against the models and tokenizers that they were written from."""

import json
import random
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from helpers.gguf_files import (
    PLAIN,
    SPLITS,
    TEMPLATE,
    byte_level,
    byte_level_fields,
    gguf_tensors,
    model_fields,
    sentencepiece_fields,
    sentencepiece_proto,
    tiny,
    write_gguf,
)
from helpers.paths import ROOT
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.conversion.gguf import importer, metadata
from lit_gpt.errors import UserError
from lit_gpt.text.tokenizer import NO_DUMMY_PREFIX, Tokenizer

TEXTS = [*PLAIN, "<s>", "<s>Hello", "<|im|>user\nHi 12</s>\n<|im|>", "x <tool> y<tool>", " <s> </s>  a", "< s>"]


@pytest.fixture(scope="module")
def source() -> LlamaForCausalLM:
    return tiny()


@pytest.fixture(scope="module")
def bpe() -> tokenizers.Tokenizer:
    return byte_level()


@pytest.fixture(scope="module")
def fields(source: LlamaForCausalLM, bpe: tokenizers.Tokenizer) -> dict[str, Any]:
    return model_fields(source.config) | byte_level_fields(bpe)


@pytest.fixture(scope="module")
def tensors(source: LlamaForCausalLM) -> dict[str, tuple[np.ndarray, Kind]]:
    return gguf_tensors(source, Kind.F32)


def converted(tmp_path: Path, fields: dict[str, Any], tensors: dict, dtype: torch.dtype = torch.float32) -> Path:
    importer.convert(write_gguf(tmp_path / "model.gguf", fields, tensors), tmp_path / "out", dtype)
    return tmp_path / "out"


@torch.no_grad()
def assert_same_logits(folder: Path, source: LlamaForCausalLM) -> None:
    idx = torch.randint(source.config.vocab_size, (2, 100), generator=torch.Generator().manual_seed(1))
    # in float64, for in float32 either is off by more than that from the truth
    found, expected = load_model(folder, torch.float64)(idx), deepcopy(source).double()(idx).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def assert_same_tokens(folder: Path, source: tokenizers.Tokenizer) -> None:
    found, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        expected = source.encode(text).ids
        assert found.encode(text).tolist() == expected or text.startswith("<s>"), text  # no second BOS
        assert theirs(text)["input_ids"] == expected, text
        assert found.decode(expected, skip_special_tokens=False) == source.decode(expected, skip_special_tokens=False)


# --- models


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "TQ2_0"])
def test_logits_are_those_of_the_source(tmp_path: Path, fields: dict, kind: str) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1} if kind == "TQ2_0" else {}
    source = tiny(tie_word_embeddings=kind in ("F16", "Q4_0"), **wide)
    folder = converted(tmp_path, fields | model_fields(source.config), gguf_tensors(source, Kind[kind]))
    assert ("lm_head.weight" in torch.load(folder / "lit_model.pth")) != source.config.tie_word_embeddings
    assert_same_logits(folder, source)


@pytest.mark.parametrize(
    "changes", [{"attention_bias": True, "mlp_bias": True, "head_dim": 32}, {"num_key_value_heads": 4}]
)
def test_variants_of_the_architecture(tmp_path: Path, fields: dict, changes: dict) -> None:
    source = tiny(**changes)
    assert_same_logits(
        converted(tmp_path, fields | model_fields(source.config), gguf_tensors(source, Kind.F32)), source
    )


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_k_quants_are_read_as_the_package_does(tmp_path: Path, fields: dict, tensors: dict, kind: str) -> None:
    block, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (64, 2 * size), dtype=np.uint8)
    # the scales of a block are float16: keep the exponents of all of them small
    half = data.reshape(64, 2, size // 2, 2)
    half[..., 1] &= 0xBB
    names = ["token_embd.weight", "blk.1.attn_k.weight"]
    file = importer.GGUFFile(
        write_gguf(tmp_path / "k.gguf", fields, tensors | dict.fromkeys(names, (data, Kind[kind])))
    )
    expected = torch.from_numpy(dequantize(data, Kind[kind]))
    assert expected.isfinite().all() and expected.std() > 0 and expected.shape == (64, 2 * block)
    weights = importer.GGUFWeights(file, torch.float32)
    assert all(torch.equal(weights[name], expected) for name in names)


def llama3_divisors(head_size: int, base: float, factor: float, original: int) -> np.ndarray:
    waves = [2 * np.pi * base ** (i / head_size) for i in range(0, head_size, 2)]
    blends = [min(max((original / wave - 1) / 3, 0), 1) for wave in waves]
    return np.array([1 / ((1 - blend) / factor + blend) for blend in blends], np.float32)


@pytest.mark.parametrize("scaling", ["llama3", "linear", "yarn", "none"])
def test_rope_scaling(tmp_path: Path, fields: dict, tensors: dict, scaling: str) -> None:
    key, base, extra = "llama.rope.scaling.", 500.0, {}
    if scaling == "llama3":
        rope = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
        stated, extra = {}, {"rope_freqs.weight": (llama3_divisors(16, base, 8.0, 64), Kind.F32)}
    elif scaling == "none":
        rope, stated, scaling = {}, {}, "default"
        extra = {"rope_freqs.weight": (np.ones(8, np.float32), Kind.F32)}
    else:
        rope = {"factor": 4.0} | ({"original_max_position_embeddings": 32} if scaling == "yarn" else {})
        stated = {key + "type": scaling, key + "factor": 4.0, key + "original_context_length": 32}
    source = tiny(rope_parameters={"rope_type": scaling, "rope_theta": base, **rope})
    folder = converted(tmp_path, fields | model_fields(source.config) | stated, gguf_tensors(source, Kind.F32) | extra)
    assert_same_logits(folder, source)
    assert AutoConfig.from_pretrained(folder).rope_parameters["rope_type"] == scaling


def test_scaling_of_published_models_is_found(tmp_path: Path, fields: dict, tensors: dict) -> None:
    divisors = llama3_divisors(128, 5e5, 32.0, 8192), Kind.F32
    file = importer.GGUFFile(write_gguf(tmp_path / "a.gguf", fields, tensors | {"rope_freqs.weight": divisors}))
    found = metadata.divided_scaling(file, 5e5, 128)
    assert (found["factor"], found["original_max_position_embeddings"]) == (32.0, 8192)


# --- tokenizers


@pytest.mark.parametrize("pre", list(SPLITS))
def test_byte_level_tokens_are_those_of_the_source(tmp_path: Path, fields: dict, tensors: dict, pre: str) -> None:
    tok = byte_level(pre)
    given = fields | byte_level_fields(tok, pre)
    given["tokenizer.ggml.add_bos_token"] = pre == "gpt-2"
    if pre == "llama-bpe":
        del given["tokenizer.ggml.add_bos_token"]
    folder = converted(tmp_path, given, tensors)
    adds_bos = pre in ("gpt-2", "llama-bpe")
    if adds_bos:  # Llama 3's has a BOS without being asked
        tok.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tok.token_to_id("<s>"))])
    assert_same_tokens(folder, tok)
    assert Tokenizer(folder).encode("Hi")[0].item() == tok.token_to_id("<s>" if adds_bos else "H")


def test_default_splits_as_llama_cpp_does(tmp_path: Path, fields: dict, tensors: dict) -> None:
    folder = converted(tmp_path, fields | {"tokenizer.ggml.pre": "default"}, tensors)
    splits = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).pre_tokenizer.pre_tokenize_str
    assert [piece for piece, _ in splits("Hi (you) 12345!? x")] == "Hi Ġ ( you ) Ġ 123 45 !? Ġx".split()


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokens_are_those_of_the_source(tmp_path: Path, tensors: dict, source, prefix: bool) -> None:
    proto = sentencepiece_proto() + (b"" if prefix else NO_DUMMY_PREFIX)
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    given = model_fields(source.config) | sentencepiece_fields(model)
    folder = converted(tmp_path, given | ({} if prefix else {"tokenizer.ggml.add_space_prefix": False}), tensors)
    found, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in PLAIN:
        expected = [1, *model.encode(text)]
        assert found.encode(text).tolist() == theirs(text)["input_ids"] == expected, text
        assert found.decode(expected) == model.decode(expected), text
    im, tool = model.piece_to_id("<|im|>"), model.piece_to_id("<tool>")
    assert found.encode("<|im|>Hello</s>").tolist() == [1, im, *model.encode("Hello"), 2]
    assert found.encode("a<tool>", bos=False).tolist() == [*model.encode("a"), tool]
    assert found.decode([1, im, tool, 2]) == "<tool>"
    assert (found.bos_token, found.eos_token, found.token_id("<unk>")) == ("<s>", "</s>", 0)


def test_eos_and_filled_up_embeddings(tmp_path: Path, fields: dict, tensors: dict, bpe: tokenizers.Tokenizer) -> None:
    n = len(fields["tokenizer.ggml.tokens"])
    filled = fields | {
        "tokenizer.ggml.tokens": [*fields["tokenizer.ggml.tokens"], *(f"[PAD{i}]" for i in range(n, 440))],
        "tokenizer.ggml.token_type": [*fields["tokenizer.ggml.token_type"], *[5] * (440 - n)],
        "tokenizer.ggml.add_eos_token": True,
    }
    found = Tokenizer(folder := converted(tmp_path, filled, tensors))
    assert found.vocab_size == n and found.token_id(f"[PAD{n}]") is None
    assert AutoTokenizer.from_pretrained(folder)("Hi")["input_ids"] == [*bpe.encode("Hi").ids, bpe.token_to_id("</s>")]


# --- the script


def run(*flags: str | Path) -> subprocess.CompletedProcess:
    script = ROOT / "scripts" / "convert_gguf_checkpoint.py"
    return subprocess.run([sys.executable, script, *flags], capture_output=True, text=True, timeout=100)


@pytest.mark.subprocess
def test_script(tmp_path: Path, fields: dict, bpe: tokenizers.Tokenizer) -> None:
    source = tiny()
    path = write_gguf(tmp_path / "a.gguf", fields, gguf_tensors(source, Kind.Q8_0))
    folder = tmp_path / "made" / "name"
    result = run("--gguf_path", path, "--checkpoint_dir", folder)
    assert (result.returncode, result.stderr) == (0, "") and str(folder) in result.stdout
    assert sorted(p.name for p in folder.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "lit_config.json", "lit_model.pth",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    model = load_model(folder)
    assert model.config.name == "name" and model.wte.weight.dtype == torch.bfloat16
    assert torch.equal(model.wte.weight, source.model.embed_tokens.weight.bfloat16())
    theirs = AutoConfig.from_pretrained(folder)
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
                "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "model_type"):  # fmt: skip
        assert getattr(theirs, key) == getattr(source.config, key), key
    assert theirs.dtype == torch.bfloat16 and theirs.architectures == ["LlamaForCausalLM"]
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [bpe.token_to_id("</s>"), bpe.token_to_id("<|im|>")] and theirs.eos_token_id == stops[0]
    assert Tokenizer(folder).chat_template == AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE
    assert_same_tokens(folder, bpe)


def test_kept_in_fewer_bits(cli, tmp_path: Path, fields: dict, tensors: dict) -> None:
    """The same folder as converting and then quantizing makes."""
    path = write_gguf(tmp_path / "a.gguf", fields, tensors)
    script, flags = "scripts/convert_gguf_checkpoint.py", {"gguf_path": path, "dtype": "fp32"}
    assert cli(script, **flags, out_dir=tmp_path / "kept", quantize="nf4").code == 0
    assert cli(script, **flags, out_dir=tmp_path / "wide").code == 0
    further = {"quantize": "nf4", "rounding": "nearest", "out_dir": tmp_path / "after"}
    assert cli("scripts/quantize.py", checkpoint_dir=tmp_path / "wide", **further).code == 0
    kept, after = (torch.load(tmp_path / name / "lit_model.pth") for name in ("kept", "after"))
    assert kept.keys() == after.keys() and all(torch.equal(kept[name], after[name]) for name in kept)
    records = [(tmp_path / name / "lit_quantize.json").read_text() for name in ("kept", "after")]
    assert records[0] == records[1]


@pytest.mark.subprocess
def test_script_refuses_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04 no model")
    result = run("--gguf_path", tmp_path / "a.gguf", "--checkpoint_dir", tmp_path / "out")
    assert result.returncode == 1 and re.fullmatch(r"error: [^\n]*a\.gguf: not a GGUF file[^\n]*\n", result.stderr)
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.subprocess
def test_script_without_a_path_is_wrong_usage(tmp_path: Path) -> None:
    result = run("--checkpoint_dir", tmp_path / "out")
    assert (result.returncode, result.stderr) == (2, "error: --gguf_path: expected a path\n")


# --- refusals


def refused(tmp_path: Path, path: Path, dtype: torch.dtype = torch.bfloat16) -> str:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        importer.convert(path, tmp_path / "out", dtype)
    assert sorted(tmp_path.rglob("*")) == before
    return str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"general.architecture": "bert"}, "general.architecture is 'bert'.*expected one of .*gemma3, .*llama"),
        ({"llama.expert_count": 8}, "lacks the metadata llama.expert_used_count"),
        ({"llama.attention.sliding_window": 8}, r"llama.attention.sliding_window \(8\) is a feature"),
        ({"llama.attention.head_count_kv": ["a", "b"]}, "head_count_kv is not a list of int"),
        ({"split.count": 2}, "one of 2 files"),
        ({"tokenizer.ggml.pre": "viking"}, "pre-tokenizer 'viking'.*expected one of chatglm-bpe, dbrx"),
        ({"tokenizer.ggml.pre": None}, "lacks the metadata tokenizer.ggml.pre"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model 't5'"),
        ({"tokenizer.ggml.tokens": None}, "lacks the metadata tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": ["a"]}, "token_type for 1 tokens"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens is not a list of str"),
        ({"tokenizer.ggml.merges": ["Ġ zz"]}, "merges do not fit"),
        ({"tokenizer.ggml.eos_token_id": 9999}, "eos_token, 9999"),
        ({"tokenizer.ggml.model": "llama"}, "lacks the metadata tokenizer.ggml.scores"),
        ({"llama.block_count": None}, "lacks the metadata llama.block_count"),
        ({"llama.block_count": "two"}, "llama.block_count is of type str"),
        ({"llama.block_count": 3}, "lacks 9 tensors of such a model: blk.2"),
        ({"llama.attention.head_count": 0}, "head_count is 0"),
        ({"llama.attention.head_count": 3}, "3 heads .* cannot share 2"),
        (
            {"llama.attention.head_count": 3, "llama.attention.head_count_kv": 3},
            "a.gguf: its metadata contradicts the tensors: blk.0.attn_q.weight",
        ),
        ({"llama.feed_forward_length": 32}, "contradicts the tensors"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "type 'longrope'"),
    ],
)
def test_metadata_refused(tmp_path: Path, fields: dict, tensors: dict, changes: dict, message: str) -> None:
    given = {key: value for key, value in (fields | changes).items() if value is not None}
    assert re.search(message, refused(tmp_path, write_gguf(tmp_path / "a.gguf", given, tensors)))


@pytest.mark.parametrize(
    "name, data, kind, message",
    [
        ("blk.0.attn_q.weight", np.zeros((64, 64)), Kind.F64, "blk.0.attn_q.weight is of type F64"),
        ("blk.0.ffn_gate_exps.weight", np.zeros((2, 2), np.float32), Kind.F32, "ffn_gate_exps.weight is not part"),
        ("output_norm.weight", np.full(64, np.nan, np.float32), Kind.F32, "output_norm.weight holds values"),
        ("output_norm.weight", np.full(64, 1e5, np.float32), Kind.F32, "not finite as torch.float16"),
        ("rope_freqs.weight", np.arange(1, 9, dtype=np.float32), Kind.F32, "rope_freqs.weight is no scaling"),
        ("output_norm.weight", None, None, "lacks 1 tensors.*output_norm.weight"),
        ("token_embd.weight", None, None, "lacks the tensor token_embd.weight"),
    ],
)
def test_tensors_refused(tmp_path: Path, fields, tensors, name: str, data, kind, message: str) -> None:
    changed = {k: v for k, v in (tensors | {name: (data, kind)}).items() if v[0] is not None}
    path = write_gguf(tmp_path / "a.gguf", fields, changed)
    assert re.search(message, refused(tmp_path, path, torch.float16))


def test_unknown_type_of_tensor_is_named(tmp_path: Path, fields: dict, tensors: dict) -> None:
    contents = write_gguf(tmp_path / "a.gguf", fields, tensors).read_bytes()
    name = b"blk.1.ffn_up.weight"
    at = contents.index(name) + len(name) + 4 + 2 * 8  # the number of dimensions, the dimensions, the type
    (tmp_path / "a.gguf").write_bytes(contents[:at] + b"\xe7\x03\0\0" + contents[at + 4 :])
    assert "blk.1.ffn_up.weight is of type number 999" in refused(tmp_path, tmp_path / "a.gguf")


def test_damaged_files_are_refused(tmp_path: Path, fields: dict, tensors: dict) -> None:
    path = write_gguf(tmp_path / "a.gguf", fields, tensors)
    whole, rng = path.read_bytes(), random.Random(0)
    header = len(whole) - sum(data.nbytes for data, _ in tensors.values())
    for size in (0, 3, 4, 10, *(rng.randrange(header) for _ in range(40)), header + 1, len(whole) - 1000):
        path.write_bytes(whole[:size])
        assert re.search("damaged or truncated|truncated|not a GGUF", refused(tmp_path, path)), size
    path.write_bytes(whole[:4] + b"\0\0\0\3" + whole[8:])
    assert "version 50331648" in refused(tmp_path, path)
    for _ in range(200):  # whatever is wrong, nothing but a UserError comes of it
        broken = bytearray(whole)
        for _ in range(3):
            broken[rng.randrange(8, header)] = rng.randrange(256)
        path.write_bytes(broken)
        try:
            file = importer.GGUFFile(path)
            metadata.hf_config(file, importer.Vocabulary(file), torch.float32)
        except UserError:
            pass


def test_destination_and_source_are_checked(tmp_path: Path, fields: dict, tensors: dict) -> None:
    path = write_gguf(tmp_path / "a.gguf", fields, tensors)
    assert "no such file" in refused(tmp_path, tmp_path / "b.gguf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("mine")
    assert "already exists and is not an empty folder" in refused(tmp_path, path)
    (tmp_path / "out" / "kept").unlink()
    assert importer.convert(path, tmp_path / "out", torch.float32).name == "out"
