"""Calibration: GPTQ against its definition, that it helps in every kind of block, and the script with it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.compare import off
from helpers.rows import write_rows
from helpers.tiny_models import tiny_hf_model
from lit_gpt import files
from lit_gpt.checkpoints import folder as checkpoint
from lit_gpt.checkpoints import io
from lit_gpt.checkpoints.base_model import BaseCheckpoint, load_model
from lit_gpt.conversion import calibration, hf, hf_shards
from lit_gpt.errors import UserError
from lit_gpt.quantization import formats, gptq

SCRIPT = "scripts/quantize.py"


@pytest.mark.parametrize("name", ["int4", "nf4"])
def test_gptq_is_its_definition(name):
    """Each column is rounded, and the rest set to what then gives the least error; by inverting anew each time."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 150, generator=generator)
    inputs += inputs @ torch.randn(150, 150, generator=generator) / 24
    square, weight = inputs.T @ inputs, torch.randn(5, 150, generator=generator)
    quantizer, squares = formats.FORMATS[name], (inputs.T @ inputs).diagonal()
    codes, fitted = gptq.gptq(weight, squares, square.inverse(), quantizer)
    tensors = quantizer.tensors(codes, *fitted)
    back = quantizer.decode(tensors)[:, :150]
    groups = torch.arange(150).split(64)
    order = [
        int(i) for g in sorted(groups, key=lambda g: -squares[g].sum()) for i in g[squares[g].argsort(descending=True)]
    ]
    w, left = weight.double(), order.copy()
    for column in order.copy():
        inverse = square.double()[left][:, left].inverse()
        numbers = [part[:, column // 64].double() for part in fitted]
        picked = quantizer.codes(w[:, column].float(), *(part.float() for part in numbers))
        assert torch.equal(codes[:, column], picked.to(torch.uint8)), column
        error = w[:, column] - back[:, column]
        w[:, left] -= error[:, None] * inverse[0] / inverse[0, 0]
        left.remove(column)
    nearest = quantizer.decode(quantizer.encode(weight))[:, :150]
    assert off(inputs @ back.T, inputs @ weight.T) < 0.9 * off(inputs @ nearest.T, inputs @ weight.T)


def logits_off(base: BaseCheckpoint, state: dict | None, ids: torch.Tensor) -> float:
    model = (replace(base, state=state, is_quantized=True) if state else base).build()
    with torch.no_grad():
        return off(model(ids), replace(base, quantize=None).build()(ids))


@pytest.mark.parametrize(
    ("family", "layout", "format"),
    [("llama", "llama3", "int4"), ("llama", "llama3", "nf4-dq"), ("falcon", None, "nf4"), ("gemma", "gemma2", "nf4"),
     ("gpt2", None, "nf4"), ("granite", None, "nf4"), ("phi", None, "int4")],
)  # fmt: skip
def test_logits_are_nearer_than_by_rounding(family, layout, format, tmp_path):
    """On the text and on other text; in blocks one after another or side by side, with norms after them, scaled."""
    from lit_gpt.families.registry import families

    module = next(f for f in families() if f.__name__.endswith("." + family))
    tiny_hf_model(family, layout or next(iter(module.tiny_hf()))).save_pretrained(tmp_path)
    hf.convert(tmp_path, hf_shards.StoredWeights(tmp_path))
    ids = torch.randint(90, (2, 64, 16), generator=torch.Generator().manual_seed(1))
    base = BaseCheckpoint.open(tmp_path, format)
    state = dict(calibration.calibrated(base, ids[0], base.dtype))
    for text, share in ((ids[0], 0.7), (ids[1], 0.85)):
        assert logits_off(base, state, text) < share * logits_off(base, None, text)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text("the cat and the dog describe a task " * 60)
    return path


def test_a_calibrated_checkpoint(cli, llama, data_dir, path, tmp_path):
    """From the model's own text, from a file of it, from rows and from prepared data; each time other codes."""
    sources = {"own": None, "text": path, "rows": write_rows(tmp_path / "r.jsonl"), "data": data_dir}
    found = {}
    for name, source in sources.items():
        more = {"calibration_path": source} if source else {}
        folder = tmp_path / name
        result = cli(SCRIPT, checkpoint_dir=llama, out_dir=folder, quantize="int4", calibration_tokens=512, **more)
        assert result.code == 0 and "wrote" in result.out, result.err
        assert ("writing 512 tokens of text to calibrate on" in result.err.splitlines()) == (name == "own")
        record, state = (
            json.loads((folder / "lit_quantize.json").read_text()),
            io.load(folder / "lit_model.pth"),
        )
        assert (
            record["codes"] == checkpoint.fingerprint(state)
            and record["source"] == BaseCheckpoint.open(llama).fingerprint
        )
        found[name] = record["codes"]
        model = load_model(folder, torch.bfloat16)
        stored, nearest = model.state_dict(), load_model(llama, torch.bfloat16, quantize="int4").state_dict()
        assert stored.keys() == nearest.keys() and torch.equal(stored["wte.weight"], nearest["wte.weight"])
        assert not torch.equal(stored["h.0.mlp.proj.weight"], nearest["h.0.mlp.proj.weight"])
    assert len(set(found.values())) == len(sources)


def test_what_was_trained_on_it_fits_no_other(cli, flags, llama, path, tmp_path):
    """While a LoRA of the full base takes any quantization of it."""
    folder, where = tmp_path / "q", {"calibration_path": path, "calibration_tokens": 512}
    assert cli(SCRIPT, checkpoint_dir=llama, out_dir=folder, **where).code == 0
    here, on_the_fly = BaseCheckpoint.open(folder), BaseCheckpoint.open(llama, "nf4")
    assert here.quantized_as(None, path) is here and on_the_fly.quantized_as(None, path) is on_the_fly
    with pytest.raises(UserError, match="trained on a base in nf4, and --checkpoint_dir .*is calibrated nf4"):
        here.quantized_as("nf4", path)
    result = cli("finetune/lora.py", **flags | {"checkpoint_dir": folder, "max_steps": 3})
    assert result.code == 0, result.err
    file, more = flags["out_dir"] / "lit_model_lora_finetuned.pth", {"prompt": "the cat", "max_new_tokens": 4}
    assert io.load(file)["quantize"] == here.quantization != "nf4"
    assert cli("generate/lora.py", checkpoint_dir=folder, lora_path=file, **more).code == 0
    for quantized in ({}, {"quantize": "nf4"}):
        refused = cli("generate/lora.py", checkpoint_dir=llama, lora_path=file, **more, **quantized)
        refused.refused(here.codes_fingerprint, "scripts/quantize.py")
    resumed = flags | {"max_steps": 3, "resume": "auto", "quantize": "nf4"}
    cli("finetune/lora.py", **resumed).refused("another quantization")
    merged = cli("scripts/merge_lora.py", checkpoint_dir=folder, lora_path=file, out_dir=tmp_path / "m")
    assert merged.code == 0, merged.err


def test_other_weights_in_a_calibrated_folder_are_noticed(cli, llama, path, tmp_path):
    where = {"calibration_path": path, "calibration_tokens": 512}
    assert cli(SCRIPT, checkpoint_dir=llama, out_dir=tmp_path / "q", **where).code == 0
    assert cli(SCRIPT, checkpoint_dir=llama, out_dir=tmp_path / "n", rounding="nearest").code == 0
    shutil.copyfile(tmp_path / "n" / "lit_model.pth", tmp_path / "q" / "lit_model.pth")
    refused = cli("generate/base.py", checkpoint_dir=tmp_path / "q", prompt="x")
    refused.refused("q/lit_model.pth", "lit_quantize.json", "quantize again")


def test_bad_input(cli, llama, path, tmp_path, monkeypatch):
    """One line each, and nothing is written, nor so much as laid out."""
    monkeypatch.setattr(files, "new_folder", lambda path: pytest.fail("too late"))
    common = {"checkpoint_dir": llama, "out_dir": tmp_path / "x"}
    empty, short, rows = tmp_path / "e.txt", tmp_path / "s.txt", tmp_path / "r.jsonl"
    empty.write_text("")
    short.write_text("the cat")
    rows.write_text('{"text": "the cat"}\n{"text": \n')
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xff")
    for bad, words in (
        (tmp_path / "no.txt", ("no.txt", "cannot be read")),
        (tmp_path / "no.jsonl", ("no.jsonl", "no such file")),
        (tmp_path / "b.txt", ("b.txt", "expected UTF-8")),
        (tmp_path, (f"--calibration_path {tmp_path}: not a folder of prepared data",)),
        (rows, ("r.jsonl: line 2", "not JSON")),
        (empty, ("holds 0 tokens", "256")),
        (short, ("s.txt", "expected 256")),
    ):
        cli(SCRIPT, **common, calibration_path=bad).refused(*words)
    for more in ({}, {"calibration_path": path}):
        refused = cli(SCRIPT, **common, **more, calibration_tokens=100)
        refused.refused("--calibration_tokens 100: expected 256 or more", code=2)
    cli(SCRIPT, **common, calibration_path=path, quantize="int8").refused("--calibration_path", code=2)
    cli(SCRIPT, **common, calibration_path=path, rounding="nearest").refused("--calibration_path", code=2)
    cli(SCRIPT, **common, rounding="calibrated", quantize="int8").refused("--rounding calibrated", code=2)
    assert not (tmp_path / "x").exists()
