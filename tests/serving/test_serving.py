"""Turns in the queue, the proof that a file acts, and the script's refusals."""

import shutil
from pathlib import Path

import pytest
import torch

from helpers.methods import LORAS, STYLE, lora_files
from lit_gpt.checkpoints.base_model import BaseCheckpoint
from lit_gpt.errors import UserError
from lit_gpt.methods import finetuned_file
from lit_gpt.methods.hyperparameters import AdapterConfig
from lit_gpt.methods.registry import make_method
from lit_gpt.serving.catalog import Catalog
from lit_gpt.serving.fair_queue import FairQueue

SCRIPT = "generate/serve.py"


def test_owners_take_turns():
    queue: FairQueue[str] = FairQueue()
    queue.push("a", ["a1", "a2", "a3"])
    queue.push("b", ["b1"])
    queue.push("c", ["c1", "c2"])
    assert queue.remove("a2") and not queue.remove("a2") and len(queue) == 5
    assert [queue.pop() for _ in range(3)] == ["a1", "b1", "c1"]
    queue.push("b", ["b2"])
    assert [queue.pop() for _ in range(3)] == ["a3", "c2", "b2"] and not len(queue)


@pytest.fixture
def folder(llama, tmp_path) -> Path:
    return shutil.copytree(llama, tmp_path / "base")


def test_a_lora_that_changes_nothing_is_refused(folder):
    (path,) = lora_files(folder, LORAS[:1])
    record = torch.load(path)
    record["state"] = {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in record["state"].items()}
    torch.save(record, folder / "none.pth")
    with pytest.raises(UserError, match="none.pth: changes nothing of what the base says"):
        Catalog.with_loras(BaseCheckpoint.open(folder), {"good": path, "none": folder / "none.pth"}, None)
    record["state"] = {k: v * torch.nan if "lora_B" in k else v + 1 for k, v in record["state"].items()}
    torch.save(record, folder / "broken.pth")
    with pytest.raises(UserError, match="broken.pth: makes logits that are not numbers"):
        Catalog.with_loras(BaseCheckpoint.open(folder), {"broken": folder / "broken.pth"}, None)
    assert Catalog.with_loras(BaseCheckpoint.open(folder), {"good": path}, None).served["good"].distance > 0


@pytest.mark.parametrize("method", ["adapter", "adapter_v2"])
def test_a_file_of_another_method_is_served_alone(folder, method):
    config, base = AdapterConfig(start_layer=0), BaseCheckpoint.open(folder)
    for change, served in ((0.0, False), (0.2, True)):
        made = make_method(method, config)
        model = base.build()
        made.attach(model)
        state = {
            name: tensor + change * torch.randn_like(tensor)
            for name, tensor in finetuned_file.trained_state(model).items()
        }
        path = folder / "mine" / "lit_model_finetuned.pth"
        path.parent.mkdir(exist_ok=True)
        finetuned_file.save_file(
            path, method, base.fingerprint, state, hyperparameters=vars(config), prompt_style=STYLE, quantize=None
        )
        if served:
            (only,) = Catalog.with_finetuned(base, path, None).served.values()
            assert only.name == "mine" and only.method == method and only.distance > 0
        else:
            with pytest.raises(UserError, match="changes nothing"):
                Catalog.with_finetuned(base, path, None)


@pytest.mark.parametrize(
    ("flags", "words", "code"),
    [
        ({"loras": "x"}, ["--loras x", "expected NAME=FILE"], 2),
        ({"loras": "=x.pth"}, ["--loras =x.pth", "expected NAME=FILE"], 2),
        ({"loras": "x=nowhere.pth"}, ["nowhere.pth"], 1),
        ({"loras": "a=b", "finetuned_path": "c"}, ["--loras", "--finetuned_path"], 2),
        ({"host": "0.0.0.0"}, ["--host 0.0.0.0", "LIT_GPT_API_KEY", "--api_key_file"], 2),
        ({"api_key_file": "nowhere"}, ["--api_key_file nowhere"], 1),
        ({"port": 99999}, ["--port 99999"], 2),
        ({"batch_size": 10**10}, ["--batch_size 10000000000", "GB"], 2),
        ({"batch_size": 0}, ["--batch_size", "above 0"], 2),
        ({"checkpoint_dir": "nowhere"}, ["nowhere"], 1),
    ],
)
def test_refusals(cli, llama, monkeypatch, flags, words, code):
    monkeypatch.delenv("LIT_GPT_API_KEY", raising=False)
    cli(SCRIPT, **{"checkpoint_dir": llama, "port": 0} | flags).refused(*words, code=code)


def test_the_bases_own_name_is_taken(cli, folder):
    (path,) = lora_files(folder, LORAS[:1])
    cli(SCRIPT, checkpoint_dir=folder, loras=f"base={path}", port=0).refused("--loras base=", "choose another", code=2)
