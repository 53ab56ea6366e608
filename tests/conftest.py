"""Small models made on the spot, and ways to run the scripts."""

import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lit_gpt.conversion import hf as hf_files
from lit_gpt.conversion import hf_shards
from lit_gpt.families.registry import families

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
LAYOUTS = [(family.__name__.rpartition(".")[2], name) for family in families() for name in family.tiny_hf()]
torch.set_num_threads(1)  # two test processes on two cores
# A shell's background job ignores SIGINT, and so would what the tests start from there.
signal.signal(signal.SIGINT, signal.default_int_handler)


def tiny_hf_model(family: str, layout: str, **fields) -> torch.nn.Module:
    """A small transformers model with random weights of all kinds, norms and biases included."""
    module = next(f for f in families() if f.__name__.endswith("." + family))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(module.tiny_hf(**fields)[layout]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            center = parameter.mean() if parameter.ndim == 1 else 0.0  # 1 of a norm's weight, or 0 if 1 is added to it
            parameter.normal_(std=0.15).add_(center)
    return model


@dataclass
class Tiny:
    """A converted checkpoint folder and the transformers model that it came from."""

    folder: Path
    hf: torch.nn.Module


@pytest.fixture(params=LAYOUTS, ids="-".join)
def tiny(request, tmp_path: Path) -> Tiny:
    """Each family and layout in turn, from the files that transformers writes."""
    model = tiny_hf_model(*request.param)
    folder = tmp_path / "checkpoints" / "tiny"
    model.save_pretrained(folder)
    hf_files.convert(folder, hf_shards.StoredWeights(folder))
    return Tiny(folder, model)


def bpe_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of 300 tokens with an end token and no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    tokenizer.train_from_iterator(["the cat and the dog", "Below is an instruction that describes a task"] * 9, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """A converted tiny Llama with a tokenizer. Not to be written to."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-llama"
    tiny_hf_model("llama", "llama3", vocab_size=320, max_position_embeddings=256).save_pretrained(folder)
    bpe_tokenizer(folder)
    hf_files.convert(folder, hf_shards.StoredWeights(folder))
    return folder


@dataclass
class Result:
    code: int
    out: str
    err: str

    def refused(self, *words: str, code: int = 1) -> str:
        """Assert that the script ended with one clear line on stderr, holding these words."""
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert self.code == code and len(errors) == 1 and "Traceback" not in self.err, (self.code, self.err)
        assert all(word in errors[0] for word in words), errors[0]
        return errors[0]


@pytest.fixture(autouse=True)
def own_ports() -> Iterator[None]:
    """What Lightning sets in this process when it starts others would hold for all later tests: one port for all."""
    yield
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)


@pytest.fixture
def cli(capfd, monkeypatch) -> Callable[..., Result]:
    """Run a script as `python SCRIPT ARGUMENTS` would, in this process: importing torch anew takes seconds."""

    def run(script: str, *arguments: object, **flags) -> Result:
        argv = [str(ROOT / script), *map(str, arguments), *(f"--{k}={v}" for k, v in flags.items())]
        monkeypatch.setattr(sys, "argv", argv)
        capfd.readouterr()
        try:
            runpy.run_path(argv[0], run_name="__main__")
            code = 0
        except SystemExit as exit:
            code = exit.code or 0
        return Result(code, *capfd.readouterr())

    return run


def spawn(script: str, **flags) -> subprocess.Popen:
    """Start a script in a process of its own."""
    argv = [sys.executable, str(ROOT / script), *(f"--{k}={v}" for k, v in flags.items())]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
