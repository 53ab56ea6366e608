"""Fixtures that several packages' tests use: tiny models, prepared data, and ways to run the scripts."""

import os
import runpy
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch

os.environ["LIT_GPT_TRIALS"] = "0"  # of processes that tests start as well: every run takes the same kernels
os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # read when triton is imported

from helpers.cli import Result
from helpers.pages import enter_place
from helpers.paths import ROOT
from helpers.rows import write_rows
from helpers.runs import lora_flags
from helpers.tiny_models import BRIEF, LAYOUTS, THOROUGH, Tiny, make_base, tiny_hf_model
from helpers.tokenizers import sentencepiece_model
from lit_gpt.conversion import hf as hf_files
from lit_gpt.conversion import hf_shards
from lit_gpt.data.args import ColumnArgs, PrepareArgs
from lit_gpt.data.prepare import prepare
from lit_gpt.kernels.policy import use_policy

torch.set_num_threads(1)  # two test processes on two cores
# A shell's background job ignores SIGINT, and so would what the tests start from there.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def same_kernels(request) -> Iterator[None]:
    """Let every machine test the same: the C++ kernels, and products as they are where 16 bits have arithmetic.

    A test that starts scripts as processes keeps to the machine's own choice, which is what these make.
    """
    own = request.node.get_closest_marker("subprocess")
    with nullcontext() if own else use_policy(widen=False, fused=True):
        yield


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> Callable[..., Tiny]:
    """Return what makes the tiny model of a family and layout, once in a session. Not to be written to."""

    @cache
    def make(family: str, layout: str) -> Tiny:
        model, folder = tiny_hf_model(family, layout), tmp_path_factory.mktemp("tiny") / "tiny"
        model.save_pretrained(folder)
        hf_files.convert(folder, hf_shards.StoredWeights(folder))
        return Tiny(folder, model)

    return make


@pytest.fixture(params=LAYOUTS, ids="-".join)
def tiny(request, converted, tmp_path: Path) -> Tiny:
    """Each family and layout in turn, from the files that transformers writes; a copy, which a test may change."""
    made, folder = converted(*request.param), tmp_path / "checkpoints" / "tiny"
    shutil.copytree(made.folder, folder)
    return Tiny(folder, deepcopy(made.hf))


@pytest.hookimpl(tryfirst=True)  # before markers select
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        params = getattr(item, "callspec", None) and item.callspec.params or {}
        family = params["tiny"][0] if "tiny" in params else params.get("family")
        name = getattr(family, "__name__", family or "").rpartition(".")[2]
        if name and name not in THOROUGH and item.originalname not in BRIEF:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """A converted tiny Llama with a tokenizer. Not to be written to."""
    return make_base(tmp_path_factory.mktemp("checkpoints") / "tiny-llama")


@pytest.fixture(scope="session")
def data_dir(llama: Path, tmp_path_factory) -> Path:
    """Data prepared for the tiny Llama. Not to be written to."""
    folder = tmp_path_factory.mktemp("data")
    args = PrepareArgs(checkpoint_dir=llama, prompt_style="alpaca", validation_fraction=0.2, seed=1)
    prepare(args, ColumnArgs(), folder / "d", str(write_rows(folder / "r.jsonl")))
    return folder / "d"


@pytest.fixture
def flags(llama: Path, data_dir: Path, tmp_path: Path) -> dict:
    """The flags of a short LoRA run on the tiny Llama."""
    return lora_flags(llama, data_dir, tmp_path / "out")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like the repository's root, in which the commands of a page are run."""
    return enter_place(tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def spm_model() -> bytes:
    """The contents of a tiny tokenizer.model."""
    return sentencepiece_model()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs CUDA")


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
