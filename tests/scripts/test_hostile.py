"""What broke when bad input was tried on all scripts: each is refused in one line that names it."""

import json
import shutil

import pytest

from helpers.cli import Result

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
        ("generation_config.json", {"eos_token_id": "x"}, "generation_config.json: eos_token_id"),
    ],
)
def test_a_damaged_checkpoint(cli, llama, tmp_path, file, fields, words):
    shutil.copytree(llama, tmp_path / "c")
    path = tmp_path / "c" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    cli("generate/base.py", checkpoint_dir=tmp_path / "c", prompt="x", max_new_tokens=2).refused(words)


def test_a_number_in_words_is_refused_at_conversion(cli, llama, tmp_path):
    shutil.copytree(llama, tmp_path / "c")
    path = tmp_path / "c" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": "x"}))
    cli("scripts/convert_hf_checkpoint.py", checkpoint_dir=tmp_path / "c").refused("norm_eps is 'x'")
