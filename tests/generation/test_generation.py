"""The decoder loop and the generate scripts."""

import os
import subprocess
import sys

import pytest
import torch

from helpers.compare import tokens
from helpers.paths import ROOT
from helpers.tiny_models import Tiny
from lit_gpt import Config, Tokenizer
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.errors import UserError
from lit_gpt.generation.engine import generate
from lit_gpt.generation.sampling import Sampling, sample
from lit_gpt.generation.steps import FastStep
from lit_gpt.generation.steps.native import NativeStep
from lit_gpt.kernels import build

SCRIPT = "generate/base.py"


def test_greedy_equals_transformers(tiny: Tiny):
    model, prompt = load_model(tiny.folder), tokens(tiny.hf, rows=1, length=9)
    expected = tiny.hf.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 9:]
    assert list(generate(model, prompt[0].tolist(), 20, temperature=0)) == expected.tolist()
    step = FastStep(model)
    assert list(generate(model, prompt[0].tolist(), 20, temperature=0, step=step)) == expected.tolist()
    if build.library("decode"):
        assert isinstance(step.chosen, NativeStep) == (not beyond_the_tape(model.config))


def beyond_the_tape(config: Config) -> bool:
    """Return whether a model has a part that the operations of a tape do not know."""
    parts = config.n_expert, config.clip_qkv, config.query_growth, config.alibi_rounded
    other = config.layer_scale or config.layer_input_size > 0 or config.mlp_class == "XIELUMLP"
    return any(parts) or other or any(x == "latent_attention" or "+" in x for x in config.mixers)


def test_greedy_with_cache_equals_without(llama):
    model, ids = load_model(llama), [5, 6, 7]
    found = list(generate(model, ids, 30, temperature=0))
    with torch.no_grad():
        for token in found:
            assert int(model(torch.tensor([ids]))[0, -1].argmax()) == token
            ids = [*ids, token]


def test_stop_ids_end_the_answer_and_are_not_part_of_it(llama):
    model = load_model(llama)
    whole = list(generate(model, [5, 6, 7], 30, temperature=0))
    stop = whole[10]
    assert list(generate(model, [5, 6, 7], 30, temperature=0, stop_ids=[stop])) == whole[: whole.index(stop)]


def test_sampling_follows_the_seed(llama):
    model = load_model(llama)

    def draw(seed: int) -> list[int]:
        return list(generate(model, [5, 6], 20, generator=torch.Generator().manual_seed(seed)))

    assert draw(1) == draw(1) != draw(2)


def test_top_k_and_top_p_keep_the_likeliest():
    torch.manual_seed(0)
    logits = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()

    def drawn(**options) -> set[int]:
        return {int(sample(logits, Sampling(**options), None)) for _ in range(400)}

    assert drawn() == {0, 1, 2, 3, 4}
    assert drawn(top_k=2) == {0, 1} and drawn(top_k=99) == {0, 1, 2, 3, 4}
    assert drawn(top_p=0.69) == {0, 1} and drawn(top_p=0.71) == {0, 1, 2} and drawn(top_p=0.0) == {0}
    assert drawn(min_p=0.39) == {0, 1} and drawn(min_p=0.41) == {0}
    assert drawn(temperature=0) == {0} and drawn(temperature=0.01) == {0}


def test_too_long_for_the_context(llama):
    with pytest.raises(UserError, match="250 tokens and --max_new_tokens 7 exceed the model's context of 256"):
        list(generate(load_model(llama), [1] * 250, 7))
    assert len(list(generate(load_model(llama), [1] * 250, 6))) == 6


def test_text_on_stdout_figures_on_stderr(cli, llama, tmp_path):
    flags = {"checkpoint_dir": llama, "temperature": 0, "precision": "fp32", "max_new_tokens": 12}
    result = cli(SCRIPT, **flags, prompt="the cat")
    assert result.code == 0 and "tokens/s" in result.err and "peak memory" in result.err
    tokenizer, model = Tokenizer(llama), load_model(llama)
    ids = generate(model, tokenizer.encode("the cat").tolist(), 12, temperature=0, stop_ids=[tokenizer.eos_id])
    assert result.out == tokenizer.decode(list(ids)) + "\n"
    (tmp_path / "prompt.txt").write_text("the cat")
    assert cli(SCRIPT, **flags, prompt_file=tmp_path / "prompt.txt").out == result.out
    several = cli(SCRIPT, **flags | {"temperature": 1}, prompt="the cat", num_samples=3)
    assert several.err.count("peak memory") == 3
    assert cli(SCRIPT, **flags | {"temperature": 1}, prompt="the cat", num_samples=3).out == several.out
    styled = cli(SCRIPT, **flags, prompt="the cat", prompt_style="alpaca")
    assert styled.code == 0 and styled.out != result.out


@pytest.mark.subprocess
def test_prompt_from_standard_input(cli, llama):
    flags = ["--checkpoint_dir", llama, "--temperature", "0", "--prompt_file", "-", "--max_new_tokens", "5"]
    process = subprocess.run(
        [sys.executable, ROOT / SCRIPT, *flags], input="the cat", capture_output=True, text=True, timeout=100
    )
    expected = cli(SCRIPT, checkpoint_dir=llama, temperature=0, prompt="the cat", max_new_tokens=5)
    assert process.returncode == 0 and process.stdout == expected.out


@pytest.mark.subprocess
@pytest.mark.parametrize("argument", [["--prompt", b"caf\xe9"], ["--prompt_file", "-"]])
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_a_prompt_that_is_not_utf8(llama, argument, locale):
    argv = [sys.executable, ROOT / SCRIPT, "--checkpoint_dir", llama, *argument]
    process = subprocess.run(
        argv, input=b"caf\xe9", capture_output=True, timeout=100, env=os.environ | {"LC_ALL": locale}
    )
    (line,) = process.stderr.decode().splitlines()
    assert process.returncode == 1 and line.startswith("error: ") and ("UTF-8" in line or "utf-8" in line)


@pytest.mark.parametrize(
    ("change", "words", "code"),
    [
        ({}, ["--prompt", "--prompt_file"], 2),
        ({"prompt": "a", "prompt_file": "b"}, ["--prompt"], 2),
        ({"prompt": ""}, ["--prompt"], 2),
        ({"prompt_file": "nowhere.txt"}, ["nowhere.txt"], 1),
        ({"prompt": "the cat " * 200}, ["exceed the model's context of 256"], 1),
        ({"prompt": "a", "temperature": -1}, ["--temperature"], 2),
        ({"prompt": "a", "top_p": 1.5}, ["--top_p", "from 0 to 1"], 2),
        ({"prompt": "a", "max_new_tokens": 0}, ["--max_new_tokens"], 2),
        ({"prompt": "a", "prompt_style": "nothing"}, ["--prompt_style nothing", "alpaca"], 2),
    ],
)
def test_refusals(cli, llama, change, words, code):
    cli(SCRIPT, **{"checkpoint_dir": llama} | change).refused(*words, code=code)
