"""The tokenizer against transformers and sentencepiece, on tokenizers trained here."""

import io
import json
import pickle
import random
import re
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import ByteLevel, TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from helpers.tokenizers import CORPUS
from lit_gpt.errors import UserError
from lit_gpt.text.tokenizer import Tokenizer

FAMILY, ACCENTS = "👩‍👩‍👧‍👦", "e\u0301 n\u0303"  # emoji joined with ZWJ; combining characters
TEXTS = [
    *("", "Hello world", "Hello  world   again ", "trailing\n", "line\nline\n\n  indented\n\ttab\t\tend\r\n"),
    *(FAMILY, f"a {FAMILY} b{FAMILY}", "日本語 中文字 한국어 ไทย", f"{ACCENTS} é ñ ﬁ ½ Ⅷ", "un▁der▁score � é\x00z"),
    *(" Hello", "   Hello", " ", "  ", "\n", "\t x", " 日本", "▁x", "\n\n a"),
    *("<s>", "<s>Hello", "<s> Hello", "<s>   x", "Hello<s>", "Hello <s> world", "<s><s>x"),
    *("a</s>b</s>", "a</s> b </s>", "a</s>  b", "</s></s>", "</s>\n", " </s>x"),
    *("x<|im|>y", "<|im|>user\nHi<|im|>\n", " x <|im|>  y <|im|> ", f"<|im|><s>日本</s>{FAMILY}"),
    *("<tool>x", "x <tool> y<tool>", "<unk>", "a<unk> b", "< s> <0x0A> <0xE2>"),
]


def write(folder: Path, **files: dict) -> Path:
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def byte_level(folder: Path, prefix_space: bool = False, bos: bool = False) -> Path:
    tok = tokenizers.Tokenizer(BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        CORPUS, BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    tok.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]) if bos else ByteLevel()
    tok.add_tokens([AddedToken("<tool>", normalized=True, lstrip=True)])
    tok.enable_truncation(4)  # files have been saved with these; transformers turns them off
    tok.enable_padding(length=9, pad_token="</s>", pad_id=1)
    tok.save(str(folder / "tokenizer.json"))
    return folder


def metaspace(folder: Path, scheme: str, bos: bool = True) -> Path:
    """As Llama's tokenizer.json: "prepend" is what transformers 4 wrote, "first" what transformers 5 writes."""
    tok = tokenizers.Tokenizer(BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tok.normalizer = normalizers.Replace(" ", "▁")
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tok.train_from_iterator(CORPUS, BpeTrainer(vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *bytes_]))
    state = json.loads(tok.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    tok = tokenizers.Tokenizer.from_str(json.dumps(state))
    if scheme == "prepend":
        tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tok.normalizer = None
        tok.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tok.decoder = decoders.Sequence(steps)
    if bos:
        tok.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tok.save(str(folder / "tokenizer.json"))
    return folder


NAMES = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
ADDED = {
    "content": "<|im|>",
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "single_word": False,
    "special": True,
}
TOOL = {**ADDED, "content": "<tool>", "rstrip": True, "special": False}
UNK = {**ADDED, "content": "<unk>"}
NEOX = {"tokenizer_class": "GPTNeoXTokenizer", "unk_token": "</s>", "pad_token": "</s>"}
BOS = {"__type": "AddedToken", **ADDED, "content": "<s>"}
JSON_CASES = {
    "neox": lambda d: write(byte_level(d), tokenizer_config={**NAMES, "add_bos_token": True}),
    "neox-class": lambda d: write(byte_level(d), tokenizer_config={**NAMES, **NEOX}),
    "falcon": lambda d: write(byte_level(d, prefix_space=True), special_tokens_map={"eos_token": "</s>"}),
    "llama3": lambda d: write(
        byte_level(d, bos=True),
        tokenizer_config={**NAMES, "bos_token": BOS},
    ),
    "added": lambda d: write(
        byte_level(d, bos=True),
        tokenizer_config={**NAMES, "additional_special_tokens": ["<|im|>"], "image_token": "<image>"},
        added_tokens={"<more>": 401, "<|im|>": 402},
        special_tokens_map={"bos_token": {**ADDED, "content": "<s>"}, "pad_token": "<pad>"},
    ),
    "decoder": lambda d: write(
        byte_level(d),
        tokenizer_config={**NAMES, "bos_token": None, "pad_token": "<pad>", "added_tokens_decoder": {"401": ADDED}},
        special_tokens_map={"bos_token": "</s>"},
    ),
    "llama2": lambda d: write(metaspace(d, "prepend"), tokenizer_config={**NAMES, "extra_special_tokens": ["<|im|>"]}),
    "first": lambda d: write(
        metaspace(d, "first"),
        tokenizer_config={**NAMES, "tokenizer_class": "LlamaTokenizer", "legacy": False, "pad_token": "<|im|>"},
    ),
    "always": lambda d: write(
        metaspace(d, "always", bos=False),
        tokenizer_config={**NAMES, "added_tokens_decoder": {"420": ADDED, "421": TOOL}},
    ),
}


def random_ids(count: int, vocab_size: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(vocab_size) for _ in range(rng.randrange(30))] for _ in range(count)]


def check_decoding(tok: Tokenizer, ref: PreTrainedTokenizerFast) -> None:
    """decode equals transformers', the stream equals decode, on texts, on their beginnings and on arbitrary ids."""
    encoded = [ref(text, add_special_tokens=False).input_ids for text in TEXTS]
    cut = [ids[start:end] for ids in encoded for start, end in ((1, None), (2, -1), (0, -1), (0, -2))]
    for ids in encoded + cut + random_ids(300, len(ref)) + [[0, len(ref) + 5, 7]]:
        for skip in (True, False):
            expected = ref.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert tok.decode(ids, skip_special_tokens=skip) == expected, ids
            assert tok.decode(torch.tensor(ids, dtype=torch.long), skip_special_tokens=skip) == expected
            assert "".join(tok.decode_stream(iter(ids), skip_special_tokens=skip)) == expected, ids


def check_names(tok: Tokenizer, ref: PreTrainedTokenizerFast) -> None:
    assert (tok.bos_token, tok.bos_id) == (ref.bos_token, ref.bos_token_id)
    assert (tok.eos_token, tok.eos_id) == (ref.eos_token, ref.eos_token_id)
    assert tok.vocab_size == len(ref)
    assert {token: tok.token_id(token) for token in ref.get_vocab()} == ref.get_vocab()
    assert tok.token_id("no such token") is None


@pytest.mark.parametrize("name", JSON_CASES)
def test_tokenizer_json_equals_transformers(name, tmp_path):
    folder = JSON_CASES[name](tmp_path)
    tok, ref = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    check_names(tok, ref)
    starts_with_bos = bool(tok.bos_id is not None and ref("x").input_ids[:1] == [tok.bos_id])
    assert starts_with_bos == (name in ("llama3", "added", "llama2", "first"))
    for text in TEXTS:
        plain = ref(text, add_special_tokens=False).input_ids
        lead = [tok.bos_id] if starts_with_bos and plain[:1] != [tok.bos_id] else []
        ids = tok.encode(text)
        assert ids.dtype == torch.long and ids.shape == (len(lead + plain),)
        assert ids.tolist() == lead + plain, text
        assert tok.encode(text, bos=False).tolist() == plain, text
    check_decoding(tok, ref)


SPM_CONFIGS = [
    {},
    {"legacy": True, "add_bos_token": True},
    {"legacy": False, "add_bos_token": True},
    {"legacy": False, "add_bos_token": False, "added_tokens_decoder": {"420": ADDED, "421": TOOL, "0": UNK}},
    {"legacy": True, "add_bos_token": True, "additional_special_tokens": ["<|im|>"], "pad_token": "<pad>"},
    {"legacy": None, "add_prefix_space": False, "bos_token": BOS},
]


@pytest.mark.parametrize("config", SPM_CONFIGS, ids=str)
def test_sentencepiece_equals_transformers(config, tmp_path, spm_model):
    (tmp_path / "tokenizer.model").write_bytes(spm_model)
    write(tmp_path, tokenizer_config={"tokenizer_class": "LlamaTokenizer", **config})
    if "additional_special_tokens" in config:
        write(tmp_path, added_tokens={"<tool>": 420})
    tok, ref = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    spm = sentencepiece.SentencePieceProcessor(model_proto=spm_model)
    check_names(tok, ref)

    prefixed = config.get("add_prefix_space") is not False
    splitter = "(" + "|".join(map(re.escape, ref.get_added_vocab())) + ")"
    compared = 0
    for text in TEXTS:
        plain = ref(text, add_special_tokens=False).input_ids
        stretches = re.split(splitter, text)[::2]
        with_prefix = (stretches if config.get("legacy") else stretches[:1]) if prefixed else []
        if not any(stretch.startswith((" ", "▁")) for stretch in with_prefix):
            compared += 1
        else:  # transformers 5 merges the text's first space with the prefix; the model was trained with both
            plain = []
            for i, part in enumerate(re.split(splitter, text)):
                if i % 2:
                    plain += [ref.convert_tokens_to_ids(part)]
                elif part and (i == 0 or config.get("legacy")):
                    plain += spm.encode(part)
                else:
                    plain += ref("<s>" + part, add_special_tokens=False).input_ids[1:]
        lead = [tok.bos_id] if config.get("add_bos_token") and plain[:1] != [tok.bos_id] else []
        if not re.search(r"<tool>\s", text):  # rstrip: the splitter above does not know it
            assert tok.encode(text).tolist() == lead + plain, text
    assert compared > 20
    check_decoding(tok, ref)


def test_sentencepiece_alone(tmp_path, spm_model):
    """Without any other file the model's own pieces name BOS and EOS, and plain text is encoded as the model does."""
    (tmp_path / "tokenizer.model").write_bytes(spm_model)
    tok, spm = Tokenizer(tmp_path), sentencepiece.SentencePieceProcessor(model_proto=spm_model)
    assert (tok.bos_token, tok.bos_id, tok.eos_token, tok.eos_id) == ("<s>", 1, "</s>", 2)
    for text in TEXTS:
        if not re.search("<s>|</s>|<unk>", text):
            assert tok.encode(text).tolist() == spm.encode(text), text
            assert tok.decode(tok.encode(text)) == text.replace("▁", " ")
    write(tmp_path, tokenizer_config={"bos_token": "", "eos_token": "", "added_tokens_decoder": {"500": ADDED}})
    tok = Tokenizer(tmp_path)
    assert (tok.bos_id, tok.eos_id, tok.token_id("<|im|>"), tok.vocab_size) == (1, 2, 500, 421)
    assert pickle.loads(pickle.dumps(tok)).encode("a<|im|>b").tolist() == tok.encode("a<|im|>b").tolist()


def test_sentencepiece_with_normalization(tmp_path):
    """A model trained with its defaults (NFKC, extra spaces removed, unigram) is followed, not LlamaTokenizer."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=120, hard_vocab_limit=False,
        user_defined_symbols=["<tool>"], control_symbols=["<|im|>"], minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tok, spm = Tokenizer(tmp_path), sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for text in ["Hello  world ", " ﬁ ½", "a<tool>b", "\u00e9e\u0301"]:
        assert tok.encode(text).tolist() == spm.encode(text), text
    ids = tok.encode("Hello<|im|>dog").tolist()
    assert ids[: len(spm.encode("Hello")) + 1] == spm.encode("Hello") + [tok.token_id("<|im|>")]


@pytest.mark.parametrize("kind", ["json", "model"])
def test_one_bos_and_one_eos(kind, tmp_path, spm_model):
    if kind == "json":
        metaspace(tmp_path, "prepend")
    else:
        (tmp_path / "tokenizer.model").write_bytes(spm_model)
    write(tmp_path, tokenizer_config={**NAMES, "add_bos_token": True})
    tok = Tokenizer(tmp_path)
    s, e = tok.bos_id, tok.eos_id
    x = tok.encode("x", bos=False).tolist()
    assert tok.encode("x").tolist() == tok.encode("x", bos=True).tolist() == [s, *x]
    for bos in (None, True, False):
        assert tok.encode("<s>x", bos=bos).tolist().count(s) == 1
        assert tok.encode("<s>", bos=bos).tolist() == [s]
        assert tok.encode("", bos=bos).tolist() == ([] if bos is False else [s])
    assert tok.encode("x", eos=True).tolist() == [s, *x, e]
    assert tok.encode("x</s>", eos=True).tolist() == tok.encode("x</s>").tolist() == [s, *x, e]
    assert tok.encode("", bos=False, eos=True).tolist() == [e]


def test_stream_comes_in_pieces(tmp_path, spm_model):
    (tmp_path / "tokenizer.model").write_bytes(spm_model)
    text = f"Hello {FAMILY} world\n 日本語 한국어 is"
    for tok in (Tokenizer(tmp_path), Tokenizer(byte_level(tmp_path))):
        ids = tok.encode(text, bos=False).tolist()
        pieces = list(tok.decode_stream(ids))
        assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
        assert len(pieces) > 8 and all(pieces)
        cut = ids[: ids.index(tok.encode(FAMILY)[-1].item())]  # in the middle of a character
        assert "".join(tok.decode_stream(cut)) == tok.decode(cut) and tok.decode(cut).endswith("\ufffd")
        assert list(tok.decode_stream([])) == []


def test_bos_and_eos_from_the_models_files(tmp_path):
    folder = byte_level(tmp_path)
    assert (Tokenizer(folder).bos_id, Tokenizer(folder).eos_id) == (None, None)
    write(folder, config={"bos_token_id": 0, "eos_token_id": 5})
    write(folder, generation_config={"eos_token_id": [1, 5]})
    tok = Tokenizer(folder)
    assert (tok.bos_token, tok.bos_id, tok.eos_token, tok.eos_id) == ("<s>", 0, "</s>", 1)
    write(folder, tokenizer_config={"bos_token": None})
    assert Tokenizer(folder).bos_id is None
    with pytest.raises(UserError, match="tokenizer_config.json: bos=True needs a bos_token"):
        Tokenizer(folder).encode("x", bos=True)


def test_chat_template(tmp_path):
    folder = byte_level(tmp_path)
    assert Tokenizer(folder).chat_template is None
    write(folder, tokenizer_config={"chat_template": "plain"})
    assert Tokenizer(folder).chat_template == "plain"
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    write(folder, tokenizer_config={"chat_template": named})
    assert Tokenizer(folder).chat_template == "yes"
    (folder / "chat_template.jinja").write_text("file {{ bos_token }}\n", encoding="utf-8")
    assert Tokenizer(folder).chat_template == "file {{ bos_token }}\n"


def test_fingerprint(tmp_path, spm_model):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    (one / "tokenizer.model").write_bytes(spm_model)
    shutil.copytree(one, two)
    seen = {Tokenizer(one).fingerprint}
    assert {Tokenizer(two).fingerprint} == seen and re.fullmatch("[0-9a-f]{64}", *seen)
    write(two, tokenizer_config={"legacy": False, "chat_template": "x", "bos_token": "<s>"})
    assert {Tokenizer(two).fingerprint} == seen
    changes = [
        {"legacy": True},
        {"add_bos_token": True},
        {"eos_token": "<unk>"},
        {"added_tokens_decoder": {"420": ADDED}},
    ]
    for config in changes:
        seen.add(Tokenizer(write(two, tokenizer_config=config)).fingerprint)
    byte_level(two)
    seen.add(Tokenizer(two).fingerprint)
    assert len(seen) == 2 + len(changes)


def test_errors_name_the_file(tmp_path):
    def error(**texts: str) -> str:
        for name, text in texts.items():
            (tmp_path / name.replace("_DOT_", ".")).write_text(text)
        with pytest.raises(UserError) as caught:
            Tokenizer(tmp_path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    with pytest.raises(UserError, match="nowhere: expected tokenizer.json or tokenizer.model"):
        Tokenizer(tmp_path / "nowhere")
    assert "found merges.txt; fetch" in error(merges_DOT_txt="")
    assert "tokenizer.model: expected a SentencePiece model" in error(tokenizer_DOT_model="version https://git-lfs")
    assert "tokenizer.json: expected a tokenizer" in error(tokenizer_DOT_json="{")
    assert "tokenizer.json: expected a tokenizer" in error(tokenizer_DOT_json='{"model": {}}')
    byte_level(tmp_path)
    assert "special_tokens_map.json: expected a JSON object" in error(special_tokens_map_DOT_json="[]")
    assert "tokenizer_config.json: expected JSON" in error(tokenizer_config_DOT_json='{"a": ')
