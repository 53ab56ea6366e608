"""The same flags give the same bytes as in commit 2d5ab8b, whose files' hashes stand here."""

import hashlib
import json
import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SCRIPT = "scripts/prepare_json.py"
CASES = {
    "plain": ({"data_path": "a.jsonl"}, "531aa362f4632769"),
    "weights": ({"data_path": "a.jsonl=2.5,b.jsonl=0.5", "seed": 7}, "da17f02a393f662f"),
    "duplicates": ({"data_path": "a.jsonl=1.5,b.jsonl", "deduplicate": True}, "51948fc7fc21eaff"),
    "validation file": (
        {"data_path": "a.jsonl", "validation_path": "b.jsonl", "deduplicate": True},
        "f55316f89e43936f",
    ),
    "bad rows": ({"data_path": "bad.jsonl", "skip_bad_rows": True, "mask_inputs": False}, "921f375b3ab924de"),
    "cut rows": ({"data_path": "a.jsonl", "max_seq_length": 60, "allow_unsupervised": True}, "f1de2ce45534b5ba"),
}


def make_inputs(folder: Path) -> None:
    """Write a tokenizer of single bytes, and rows: of all forms, repeated, without an answer and damaged."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    generator = random.Random(1)
    for name, n in (("a", 60), ("b", 20)):
        rows = [json.dumps(make_row(i, generator)) for i in range(n)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    lines = (folder / "a.jsonl").read_text().splitlines()
    lines[3], lines[9], lines[20] = "{", '{"instruction": "a"}', "[]"
    (folder / "bad.jsonl").write_text("\n".join(lines))


def make_row(i: int, generator: random.Random) -> dict:
    text = " ".join(generator.choices(("the", "cat", "dog", "näh", "🙂"), k=generator.randint(1, 9)))
    if i % 7 == 0:
        turns = [("user", text), ("assistant", text[:9]), ("user", "x"), ("assistant", "y")]
        return {"messages": [{"role": role, "content": words, "train": words != "y"} for role, words in turns]}
    if i % 9 == 0:
        return {"instruction": "same", "output": "same"}
    return {"instruction": text, "input": text[:5] * (i % 2), "output": " " if i % 13 == 0 else text[::-1]}


def digest(folder: Path) -> str:
    """Return a hash of both splits and of the audit."""
    files = [(folder / f"{split}.safetensors").read_bytes() for split in ("train", "validation")]
    audit = json.dumps(json.loads((folder / "data.json").read_text())["audit"], sort_keys=True)
    return hashlib.sha256(b"".join([*files, audit.encode()])).hexdigest()[:16]


@pytest.mark.parametrize("case", CASES)
def test_prepared_files_equal_those_of_before(cli, llama, tmp_path, monkeypatch, case):
    flags, expected = CASES[case]
    monkeypatch.chdir(tmp_path)
    make_inputs(tmp_path)
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    result = cli(SCRIPT, checkpoint_dir=tmp_path, prompt_style="chatml", out_dir=tmp_path / "d", **flags)
    assert result.code == 0, result.err
    assert digest(tmp_path / "d") == expected
