"""Perplexity: each token once, with its context; the same figure as transformers' loss and as a finetune's."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from helpers.tiny_models import Tiny
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.evaluation.perplexity import score_text, windows


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
    model = load_model(tiny.folder)
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


def test_the_script(cli, flags, llama, tmp_path):
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
    script, path, folder = "eval/perplexity.py", tmp_path / "t.txt", tmp_path / "d"
    path.write_text("the cat and the dog")
    text, prepared = {"checkpoint_dir": llama, "text_path": path}, {"checkpoint_dir": llama, "data_dir": folder}
    cli(script, checkpoint_dir=llama).refused("nothing to score", "--text_path", "--data_dir", code=2)
    cli(script, **text, data_dir=folder).refused(f"--text_path {path}", f"--data_dir {folder}", code=2)
    for common, used, unused in (
        (text, "--text_path", {"split": "validation", "samples": 3}),
        (prepared, "--data_dir", {"window": 100, "context": 50}),
    ):
        for name, value in unused.items():
            refused = cli(script, **common, **{name: value})
            refused.refused(f"--{name}: is not used by {used}; leave it out", code=2)
    cli(script, **prepared).refused(f"--data_dir {folder}: not a folder of prepared data")
    cli(script, checkpoint_dir=llama, text_path=tmp_path / "no").refused("--text_path", "no", "cannot be read")
    cli(script, **text, window=8, context=8).refused("--context 8", "--window 8", code=2)
    cli(script, **text, window=1).refused("--context 0", "--window 1", code=2)
    cli(script, **text, window=258).refused("--window 258: expected 257 or less", code=2)
    path.write_text("")
    cli(script, **text).refused(f"--text_path {path}: holds fewer than two tokens")
