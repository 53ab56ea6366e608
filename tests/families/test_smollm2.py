"""A real model, SmolLM2-135M-Instruct: equal to transformers, and it learns."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.compare import off
from helpers.paths import SHARED
from lit_gpt import Tokenizer
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.conversion import hf, hf_shards
from lit_gpt.generation.engine import generate
from lit_gpt.kernels.policy import KernelPolicy, use_policy
from lit_gpt.text.prompt_style import PromptStyle

TOOL, ROWS = SHARED / "tools" / "make_smollm2.py", SHARED / "data" / "gsm8k_train.jsonl"
pytestmark = [
    pytest.mark.slow,  # the batteries of tests/families hold tiny models to the same
    pytest.mark.subprocess,
    pytest.mark.skipif(not TOOL.exists(), reason=f"{TOOL} makes the model, and is absent"),
]
MESSAGES = [{"role": "user", "content": "Explain in three sentences why the sky is blue. 🙂 你好"}]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "SmolLM2-135M-Instruct"
    subprocess.run([sys.executable, TOOL, folder], check=True, capture_output=True)
    hf.convert(folder, hf_shards.StoredWeights(folder))
    return folder


def test_equal_to_transformers(smollm2):
    """Logits in float32, the rendered prompt's tokens, and the text of 64 greedy tokens."""
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    their_tokenizer = AutoTokenizer.from_pretrained(smollm2)
    expected = their_tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    model, tokenizer = load_model(smollm2, torch.float32), Tokenizer(smollm2)
    style = PromptStyle.from_checkpoint(smollm2, tokenizer)
    ids = style.encode_prompt(MESSAGES, tokenizer)
    assert ids == expected
    idx = torch.tensor([ids])
    with torch.no_grad():
        assert off(model(idx), theirs(idx).logits) < 1e-4
    text = their_tokenizer.decode(theirs.generate(idx, max_new_tokens=64, do_sample=False)[0, len(ids) :])
    ours = generate(model, ids, 64, temperature=0, stop_ids=style.stop_ids)
    assert "".join(tokenizer.decode_stream(ours)) == text.removesuffix("<|im_end|>") and len(text) > 100


def test_a_few_steps_lower_the_validation_loss(cli, smollm2, tmp_path):
    rows = sorted(ROWS.read_text().rstrip().split("\n"), key=len)[:40]  # the shortest, for time
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    prepared = cli("scripts/prepare_json.py", checkpoint_dir=smollm2, json_path=tmp_path / "rows.jsonl",
                   destination_path=tmp_path / "data", validation_fraction=0.2)  # fmt: skip
    assert prepared.code == 0, prepared.err
    with use_policy(**vars(KernelPolicy())):  # by what is fast on this machine
        result = cli("finetune/lora.py", checkpoint_dir=smollm2, data_dir=tmp_path / "data", out_dir=tmp_path / "out",
                     max_steps=6, batch_size=4, warmup_steps=1, lora_mlp="true", sample_tokens=0)  # fmt: skip
    assert result.code == 0, result.err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["val_loss_last"] < summary["val_loss_first"] - 0.02
