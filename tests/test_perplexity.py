"""Perplexity: each token once, with its context; the same figure as transformers' loss and as a finetune's."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import Tiny
from test_train import data_dir, flags  # noqa: F401 (fixtures)

from lit_gpt import GPT
from lit_gpt.perplexity import score_text, windows


@pytest.mark.parametrize(("n", "length", "context"), [(2, 8, 3), (8, 8, 3), (9, 8, 7), (50, 8, 1), (51, 10, 4)])
def test_each_token_is_scored_once_with_its_context(n, length, context):
    scored = []
    for start, first, stop in windows(n, length, context):
        assert 0 <= start < first < stop <= n and stop - start <= length
        assert first - start >= min(context, first)
        scored += range(first, stop)
    assert scored == list(range(1, n))


@torch.no_grad()
def test_loss_is_transformers(tiny: Tiny):
    """In windows of 12 tokens: log-probabilities of transformers, window by window."""
    model = GPT.from_checkpoint(tiny.folder)
    ids = torch.randint(96, (40,), generator=torch.Generator().manual_seed(0))
    nats = 0.0
    for start, first, stop in windows(40, 12, 5):
        logits = tiny.hf(ids[None, start:stop]).logits[0].log_softmax(-1)
        nats -= sum(logits[i - 1 - start, ids[i]].item() for i in range(first, stop))
    found = score_text(model, ids, 12, 5)
    assert found.tokens == 39 and found.loss == pytest.approx(nats / 39, rel=1e-5)
    whole = F.cross_entropy(tiny.hf(ids[None]).logits[0, :-1], ids[1:]).item()
    assert score_text(model, ids, 40, 20).perplexity == pytest.approx(math.exp(whole), rel=1e-5)
    assert found.loss != pytest.approx(whole, rel=1e-5)


def test_the_script(cli, flags, llama, tmp_path):  # noqa: F811
    """On data it gives the validation loss that a finetune reports, on text one line."""
    result = cli("finetune/lora.py", **flags | {"eval_samples": "null", "max_steps": 4})
    assert result.code == 0, result.err
    summary = json.loads((flags["out_dir"] / "summary.json").read_text())
    common = {"checkpoint_dir": llama, "precision": "fp32"}
    place = {"data_dir": flags["data_dir"], "json": "true"}
    for name, more in (("first", {}), ("last", {"finetuned_path": flags["out_dir"] / "lit_model_lora_finetuned.pth"})):
        result = cli("eval/perplexity.py", **common, **place, **more)
        found = json.loads(result.out)
        assert found["loss"] == pytest.approx(summary[f"val_loss_{name}"], rel=1e-4)
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    (tmp_path / "t.txt").write_text("the cat and the dog describe a task " * 40)
    result = cli("eval/perplexity.py", **common, text_path=tmp_path / "t.txt", window=32, quantize="int8")
    assert result.code == 0 and result.out.startswith("perplexity ") and result.out.count("\n") == 1


def test_bad_input(cli, llama, tmp_path):
    cli("eval/perplexity.py", checkpoint_dir=llama).refused("--text_path", "--data_dir", code=2)
    cli("eval/perplexity.py", checkpoint_dir=llama, text_path=tmp_path / "no").refused("--text_path", "no")
    (tmp_path / "t.txt").write_text("the cat and the dog")
    text = {"checkpoint_dir": llama, "text_path": tmp_path / "t.txt"}
    cli("eval/perplexity.py", **text, window=8, context=8).refused("--context 8", "--window 8", code=2)
    (tmp_path / "t.txt").write_text("")
    cli("eval/perplexity.py", **text).refused("fewer than two tokens")
