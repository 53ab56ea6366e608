"""What broke when bad input was tried on all scripts: each is refused in one line that names it."""

import json
import shutil
from functools import partial

import pytest

from helpers.cli import Result
from helpers.methods import LORAS, lora_files

TUNE = dict(max_steps=1, warmup_steps=0, precision="fp32", sample_tokens=0)


@pytest.fixture
def tune(cli, llama, data_dir, tmp_path):
    def run(**flags) -> Result:
        return cli(
            "finetune/lora.py", **dict(checkpoint_dir=llama, data_dir=data_dir, out_dir=tmp_path / "o") | TUNE | flags
        )

    return run


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"learning_rate": "inf"}, "--learning_rate: expected a number above 0, got 'inf'"),
        ({"learning_rate": "1e400"}, "--learning_rate"),
        ({"weight_decay": "inf"}, "--weight_decay: expected a number, 0 or more, got 'inf'"),
        ({"epochs": "inf"}, "--epochs"),
        ({"max_grad_norm": "nan"}, "--max_grad_norm"),
        ({"optimizer": "torch.optim"}, "--optimizer torch.optim: is no class"),
        ({"lora_r": 100_000}, "--lora_r 100000: no adapted layer has a rank above"),
        ({"metric": ":f"}, "--metric :f"),
    ],
)
def test_flags(tune, flags, words):
    result = tune(**flags)
    assert result.code in (1, 2)
    result.refused(words, code=result.code)


@pytest.mark.parametrize(
    "style", [3, {"name": "x"}, None, {"name": 1, "template": 2, "own_bos": False, "stop_ids": []}]
)
def test_a_damaged_prompt_style(tune, data_dir, tmp_path, style):
    shutil.copytree(data_dir, tmp_path / "d")
    record = json.loads((data_dir / "data.json").read_text()) | {"prompt_style": style}
    (tmp_path / "d" / "data.json").write_text(json.dumps(record))
    tune(data_dir=tmp_path / "d").refused("data.json: the prompt style", "prepare the data again")


@pytest.mark.parametrize(
    ("file", "fields", "words"),
    [
        ("lit_config.json", {"norm_class": "X"}, "norm_class is 'X', expected one of LayerNorm"),
        ("lit_config.json", {"mlp_class": "X"}, "mlp_class is 'X', expected one of GptNeoxMLP"),
        ("lit_config.json", {"norm_eps": "x"}, "norm_eps is 'x', expected a number"),
        ("prompt_style.json", {"template": 5}, "make the folder again, or remove the file to take"),
        ("generation_config.json", {"eos_token_id": "x"}, "generation_config.json: eos_token_id"),
    ],
)
def test_a_damaged_checkpoint(cli, llama, tmp_path, file, fields, words):
    shutil.copytree(llama, tmp_path / "c")
    path = tmp_path / "c" / file
    held = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(held | fields))
    cli("generate/base.py", checkpoint_dir=tmp_path / "c", prompt="x", max_new_tokens=2).refused(words)


def test_two_prompts(cli, llama, tmp_path):
    (tmp_path / "p.txt").write_text("x")
    flags = {"checkpoint_dir": llama, "prompt": "x", "prompt_file": tmp_path / "p.txt"}
    cli("generate/base.py", **flags).refused("--prompt and --prompt_file", "leave one of them out", code=2)


def test_fp16_on_a_cpu_is_said(cli, llama):
    flags = {"checkpoint_dir": llama, "prompt": "x", "max_new_tokens": 2, "device": "cpu"}
    said = [cli("generate/base.py", **flags, precision=name).err for name in ("fp16", "bf16")]
    assert "fp16 on a CPU is many times slower" in said[0] and "fp16" not in said[1]


def test_a_file_and_flags_that_contradict_it(cli, llama, data_dir, tmp_path):
    llama = shutil.copytree(llama, tmp_path / "base")
    (lora,) = lora_files(llama, LORAS[:1])
    flags = {"checkpoint_dir": llama, "data_dir": data_dir, "finetuned_path": lora}
    for method in ("adapter", "full"):
        cli("scripts/check.py", **flags, method=method).refused(
            f"--method {method}: ", "was trained by the method lora", code=2
        )
    cli("scripts/check.py", **flags, lora_r=7).refused("--lora_r 7", "has --lora_r 2 ", code=2)


def test_a_plan_that_cannot_be_made(cli, llama):
    run = partial(cli, "scripts/plan.py")
    run(model="falcon").refused("--model: unknown model 'falcon'; did you mean falcon-", code=2)
    run(model="smollm2-135m").refused("did you mean SmolLM2-135M?", code=2)
    run(model="xyz").refused("published sizes, such as ", code=2)
    run(model="falcon-7b", checkpoint_dir=llama).refused("--model falcon-7b: does not go with", code=2)
    run(model="falcon-7b", method="foo").refused("--method foo: ", "lora", "bitfit", code=2)


def test_a_number_in_words_is_refused_at_conversion(cli, llama, tmp_path):
    shutil.copytree(llama, tmp_path / "c")
    path = tmp_path / "c" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": "x"}))
    cli("scripts/convert_hf_checkpoint.py", checkpoint_dir=tmp_path / "c").refused("norm_eps is 'x'")
