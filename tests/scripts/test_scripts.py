"""The scripts as users meet them: help, conversion and export, and what they say to bad input."""

import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.cli import Result
from helpers.paths import ROOT
from helpers.tiny_models import tiny_hf_model
from lit_gpt.checkpoints import folder as checkpoint
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.conversion import hf_shards
from lit_gpt.methods import finetuned_file

SCRIPTS = sorted(
    str(path.relative_to(ROOT)) for d in ("scripts", "finetune", "generate", "eval") for path in (ROOT / d).glob("*.py")
)
CONVERT = "scripts/convert_hf_checkpoint.py"


@pytest.mark.subprocess
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_flag_without_importing_torch(script):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as exit: assert not exit.code\n"
        "heavy = {'torch', 'lightning', 'transformers', 'numpy', 'matplotlib'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    flags = [flag[1] for flag in re.finditer(r"^([a-z]\w*): .* = ", (ROOT / script).read_text(), re.M)]
    shown = set(re.findall(r"^  (--\w+|[A-Z_]+) ", process.stdout, re.M))
    assert flags and all(shown & {f"--{flag}", flag.removesuffix("s").upper()} for flag in flags)  # DIR of dirs
    assert not re.findall(r"^  (--\w+ [\w{},-]+) +\[", process.stdout, re.M)  # a flag without a word of help
    if script.startswith("finetune/"):
        assert {"--max_grad_norm", "--keep_states", "--strategy", "--probe_path"} <= shown


@pytest.mark.subprocess
@pytest.mark.parametrize("module", ["lit_gpt.serving.server", "lit_gpt.generation.answer", "lit_gpt.generation.chat"])
def test_answering_imports_nothing_that_only_training_needs(module):
    code = (
        f"import {module}, sys\n"
        "assert not {'lightning_fabric', 'lightning', 'torch.distributed.fsdp', 'torch._dynamo'} & sys.modules.keys()\n"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


@pytest.fixture
def downloaded(tmp_path) -> Path:
    """A folder as scripts/download.py leaves it."""
    folder = tmp_path / "checkpoints" / "owner" / "name"
    tiny_hf_model("llama", "llama3").save_pretrained(folder)
    return folder


def test_convert_and_export(cli, downloaded, tmp_path):
    result = cli(CONVERT, checkpoint_dir=downloaded, dtype="bf16")
    assert result.code == 0 and "generate/base.py" in result.out
    assert {p.dtype for p in load_model(downloaded).parameters()} == {torch.bfloat16}
    result = cli("scripts/convert_lit_checkpoint.py", checkpoint_dir=downloaded, out_dir=tmp_path / "hf")
    assert result.code == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    original = load_file(downloaded / "model.safetensors")
    assert all(torch.equal(exported[name], tensor.bfloat16()) for name, tensor in original.items())
    result = cli("scripts/convert_lit_checkpoint.py", checkpoint_dir=downloaded, out_dir=tmp_path / "hf")
    result.refused("already exists")
    cli("scripts/convert_lit_checkpoint.py", checkpoint_dir=downloaded).refused("--out_dir", code=2)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_json(path: Path, **change) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def write_index(folder: Path, text: str) -> None:
    """Put an index in the place of the one file of weights, which would be taken first."""
    (folder / "model.safetensors").unlink()
    (folder / hf_shards.INDEX).write_text(text)


BAD_DOWNLOADS = {
    "missing folder": (shutil.rmtree, ["no such folder", "scripts/download.py"]),
    "no config": (lambda d: (d / "config.json").unlink(), ["not a checkpoint folder", "config.json is missing"]),
    "broken config": (lambda d: (d / "config.json").write_text("{"), ["config.json", "not a readable JSON file"]),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ["no weights", "model.safetensors"]),
    "truncated": (lambda d: truncate(d / "model.safetensors"), ["not a readable safetensors"]),
    "empty": (lambda d: (d / "model.safetensors").write_bytes(b""), ["not a readable safetensors"]),
    "unknown architecture": (lambda d: edit_json(d / "config.json", model_type="mamba"), ["model_type 'mamba'"]),
    "other size": (
        lambda d: edit_json(d / "config.json", intermediate_size=113),
        ["config.json contradicts the tensors", "mlp.gate_proj", "(112, 64)"],
    ),
    "fewer layers": (
        lambda d: edit_json(d / "config.json", num_hidden_layers=1),
        ["9 tensors", "model.layers.1", "llama family does not name"],
    ),
    "more layers": (lambda d: edit_json(d / "config.json", num_hidden_layers=3), ["lack 9 tensors", "model.layers.2"]),
    "unnamed tensor": (
        lambda d: edit_weights(d, lambda t: t.update({"model.extra.weight": torch.ones(1)})),
        ["1 tensors", "model.extra.weight"],
    ),
    "missing shard": (
        lambda d: write_index(d, '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'),
        ["model-00001-of-00002.safetensors", "missing"],
    ),
    "broken index": (lambda d: write_index(d, '{"weight'), [hf_shards.INDEX, "not a readable JSON"]),
    "activation": (lambda d: edit_json(d / "config.json", hidden_act="relu6"), ["activation 'relu6'", "silu"]),
    "rope": (
        lambda d: edit_json(d / "config.json", rope_parameters={"rope_type": "dynamic", "factor": 2}),
        ["rope_type 'dynamic'"],
    ),
}


@pytest.mark.parametrize("case", BAD_DOWNLOADS)
def test_bad_downloads(cli, downloaded, case):
    spoil, words = BAD_DOWNLOADS[case]
    spoil(downloaded)
    before = sorted(path.name for path in downloaded.iterdir()) if downloaded.exists() else []
    cli(CONVERT, checkpoint_dir=downloaded).refused(*words)
    assert before == (sorted(path.name for path in downloaded.iterdir()) if downloaded.exists() else [])


class Malicious:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def put_code(path: Path, zipped: bool) -> None:
    contents = {"wte.weight": Malicious(path.with_name("executed"))}
    torch.save(contents, path) if zipped else path.write_bytes(pickle.dumps(contents))


BAD_CHECKPOINTS = {
    "unconverted": (lambda d: (d / "lit_model.pth").unlink(), ["not converted yet", "convert_hf_checkpoint.py"]),
    "truncated": (lambda d: truncate(d / "lit_model.pth"), ["lit_model.pth", "truncated"]),
    "empty": (lambda d: (d / "lit_model.pth").write_bytes(b""), ["lit_model.pth", "truncated"]),
    "code": (lambda d: put_code(d / "lit_model.pth", True), ["lit_model.pth", "code, which is never run"]),
    "bare pickle": (
        lambda d: put_code(d / "lit_model.pth", False),
        ["lit_model.pth", "not a readable file"],
    ),
    "config": (lambda d: (d / "lit_config.json").write_text("[]"), ["lit_config.json", "convert the checkpoint again"]),
    "other config": (lambda d: edit_json(d / "lit_config.json", n_layer=3), ["lit_model.pth", "lacks h.2"]),
    "other sizes": (lambda d: edit_json(d / "lit_config.json", intermediate_size=16), ["does not fit", "mlp"]),
    "unknown field": (lambda d: edit_json(d / "lit_config.json", flavour=1), ["lit_config.json", "flavour"]),
    "not only tensors": (lambda d: torch.save({"a": 1}, d / "lit_model.pth"), ["holds more than tensors"]),
    "odd tensors": (
        lambda d: torch.save({"a": torch.tensor(1.0), "b": torch.ones(0), "c": torch.ones(0, 3)}, d / "lit_model.pth"),
        ["lit_model.pth", "does not fit the model"],
    ),
    "tensor list": (lambda d: torch.save([torch.ones(1)], d / "lit_model.pth"), ["expected a dictionary"]),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), ["tokenizer"]),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoints(cli, llama, tmp_path, case):
    folder = tmp_path / "c"
    shutil.copytree(llama, folder)
    spoil, words = BAD_CHECKPOINTS[case]
    spoil(folder)
    cli("generate/base.py", checkpoint_dir=folder, prompt="a").refused(*words)
    assert not (folder / "executed").exists()


def test_a_bin_shard_that_holds_code_is_not_executed(cli, downloaded):
    (downloaded / "model.safetensors").unlink()
    for zipped in (True, False):
        put_code(downloaded / "pytorch_model.bin", zipped)
        cli(CONVERT, checkpoint_dir=downloaded).refused("pytorch_model.bin")
        assert not (downloaded / "executed").exists()


BAD_LORA_FILES = {
    "missing": (Path.unlink, ["no such file"]),
    "truncated": (truncate, ["truncated"]),
    "code": (lambda path: put_code(path, True), ["code, which is never run"]),
    "not lora": (lambda path: torch.save({"a": torch.ones(1)}, path), ["not a finetuned file"]),
    "other base": (lambda path: edit_record(path, base="0123"), ["another base", "0123"]),
    "other version": (lambda path: edit_record(path, format_version=99), ["format version 99"]),
    "other method": (lambda path: edit_record(path, method="adapter"), ["adapter", "expected lora"]),
    "other rank": (lambda path: edit_record(path, hyperparameters={"r": 2}), ["does not fit the model", "lora_A"]),
    "unknown setting": (lambda path: edit_record(path, hyperparameters={"dora": True}), ["dora"]),
}


def lora_file(folder: Path, base: Path) -> Path:
    """An untrained one."""
    from lit_gpt.methods import lora

    model = lora.attach(load_model(base), lora.LoRAConfig())
    style = {"name": "plain", "template": "{{ messages[0].content }}", "own_bos": False, "stop_ids": []}
    path, fingerprint = folder / "lit_model_lora_finetuned.pth", checkpoint.fingerprint(checkpoint.load_state(base))
    state = finetuned_file.trained_state(model)
    finetuned_file.save_file(path, "lora", fingerprint, state, hyperparameters={}, prompt_style=style)
    return path


def edit_record(path: Path, **change) -> None:
    torch.save(torch.load(path) | change, path)


@pytest.mark.parametrize("case", BAD_LORA_FILES)
def test_bad_lora_files(cli, llama, tmp_path, case):
    path = lora_file(tmp_path, llama).rename(tmp_path / "lora.pth")
    good = cli("generate/lora.py", checkpoint_dir=llama, lora_path=path, prompt="a", max_new_tokens=2)
    assert good.code == 0, good.err
    spoil, words = BAD_LORA_FILES[case]
    spoil(path)
    cli("generate/lora.py", checkpoint_dir=llama, lora_path=path, prompt="a").refused("lora.pth", *words)
    cli("scripts/merge_lora.py", checkpoint_dir=llama, lora_path=path, out_dir=tmp_path / "m").refused(
        "lora.pth", *words
    )
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".m.*"))


def test_conversion_cut_short_leaves_the_folder_unconverted(cli, downloaded, monkeypatch):
    """An error in the middle of the write: no lit_model.pth, no temporary file; the next run is whole."""
    from lit_gpt.conversion import weights

    real = weights.to_lit

    def failing(*args):
        yield next(real(*args))
        raise OSError(5, "Input/output error", "shard")

    monkeypatch.setattr(weights, "to_lit", failing)
    before = sorted(path.name for path in downloaded.iterdir())
    cli(CONVERT, checkpoint_dir=downloaded).refused("Input/output error")
    assert sorted(path.name for path in downloaded.iterdir()) == before
    monkeypatch.undo()
    assert cli(CONVERT, checkpoint_dir=downloaded).code == 0


@pytest.mark.parametrize(
    ("script", "flags", "advice"),
    [
        ("generate/base.py", {"prompt": "a"}, "a lower --batch_size or a lower --max_new_tokens or --quantize nf4"),
        ("generate/base.py", {"prompt": "a", "quantize": "int8"}, "a lower --batch_size or a lower --max_new_tokens"),
        ("chat/base.py", {"max_new_tokens": 9}, "a lower --context or a lower --max_new_tokens or --quantize nf4"),
        ("scripts/quantize.py", {"out_dir": "x"}, "a lower --calibration_tokens"),
        ("scripts/merge_lora.py", {"out_dir": "x"}, None),
    ],
)
def test_out_of_memory_on_a_cpu(cli, llama, tmp_path, monkeypatch, script, flags, advice):
    """One line, and nothing is advised that the script has no flag for."""
    monkeypatch.chdir(tmp_path)
    if script == "scripts/merge_lora.py":
        flags = flags | {"lora_path": lora_file(tmp_path, llama)}
    monkeypatch.setattr(checkpoint, "read_state", lambda *_: torch.empty(10**15, dtype=torch.uint8))
    said = cli(script, checkpoint_dir=llama, **flags).refused("out of memory: tried to allocate 1,000,000,000 MB")
    assert said.partition("; try ")[2] == (advice or "") and not (tmp_path / "x").exists()


def test_unexpected_arguments(cli, llama, tmp_path):
    for arguments, word in (((llama, "--prompt=hi"), str(llama)), (("--prompt", "hi", "there"), "there")):
        said = cli("generate/base.py", *arguments).refused(f"unexpected argument '{word}'", code=2)
        assert "--checkpoint_dir PATH" in said and "unknown flag" not in said
    cli("generate/base.py", "-prompt", "hi").refused("unknown flag -prompt; did you mean --prompt?", code=2)
    (tmp_path / "c.json").write_text('["seed"]')
    cli("generate/base.py", config=tmp_path / "c.json").refused("c.json", "expected an object of flag values", code=2)
    (tmp_path / "c.json").write_text('{"sed": 1}')
    cli("generate/base.py", config=tmp_path / "c.json").refused("c.json", "unknown flag --sed; did you mean", code=2)
    cli("generate/base.py", checkpoint_dir=llama, prompt="a", prompt_style="nope").refused("alpaca, chatml", code=2)


def test_a_folder_in_place_of_a_file(cli, llama, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "summary.json").write_text("{}")
    merge = {"checkpoint_dir": llama, "lora_path": run, "out_dir": tmp_path / "m"}
    cli("scripts/merge_lora.py", **merge).refused(f"{run}: is a folder", "name the file in it")
    path = lora_file(run, llama)
    for script, flags in (
        ("scripts/merge_lora.py", merge),
        ("generate/lora.py", {"checkpoint_dir": llama, "lora_path": run, "prompt": "a"}),
        ("chat/base.py", {"checkpoint_dir": llama, "finetuned_path": run}),
    ):
        cli(script, **flags).refused(f"{run}: is a folder", f"did you mean {path}?")
    assert not (tmp_path / "m").exists()


@pytest.mark.subprocess
@pytest.mark.parametrize("script", ["scripts/merge_lora.py", "scripts/quantize.py"])
def test_a_full_disk(llama, tmp_path, script):
    """Which ends torch's writing with an error of its own. Nothing is left of what was written."""
    flags = {"checkpoint_dir": llama, "out_dir": tmp_path / "out"}
    flags |= {"lora_path": lora_file(tmp_path, llama)} if "lora" in script else {"rounding": "nearest"}
    before = sorted(tmp_path.iterdir())
    process = subprocess.run(
        [sys.executable, ROOT / script, *(f"--{name}={value}" for name, value in flags.items())],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    Result(process.returncode, process.stdout, process.stderr).refused("lit_model.pth", "is the disk full?")
    assert sorted(tmp_path.iterdir()) == before


def test_unwritable_destination(cli, downloaded):
    cli(CONVERT, checkpoint_dir=downloaded)
    cli("scripts/convert_lit_checkpoint.py", checkpoint_dir=downloaded, out_dir="/proc/x").refused("/proc")
