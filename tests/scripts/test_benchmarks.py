"""benchmarks/train_speed.py on a tiny model: what it writes, and that all contestants do the same work. No speed."""

import json
import subprocess
import sys

import pytest

from helpers.paths import ROOT
from lit_gpt.families.registry import config_from_name

SCRIPT = "benchmarks/train_speed.py"
TINY = dict(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=96)


def measure(out_dir, **flags) -> tuple[dict, str, subprocess.CompletedProcess]:
    """Two steps in float32 without dropout, in which losses must agree; returns JSON, table and process."""
    flags = dict(
        model_fields=json.dumps(flags.pop("fields")), out_dir=out_dir, precision="fp32", lora_dropout=0, steps=2,
        warmup=0, learning_rate=0.02, **flags,
    )  # fmt: skip
    argv = [sys.executable, str(ROOT / SCRIPT), *(f"--{k}={v}" for k, v in flags.items())]
    process = subprocess.run(argv, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    result = json.loads((out_dir / "train_speed_cpu.json").read_text())
    return result, (out_dir / "train_speed_cpu.md").read_text(), process


@pytest.mark.slow
@pytest.mark.subprocess
def test_contestants_do_the_same_work(tmp_path):
    fields = dict(TINY, intermediate_size=112, num_key_value_heads=2)
    result, table, process = measure(
        tmp_path, model="SmolLM2-135M", fields=fields, contestants="ours,peft,peft_tuned,litgpt", starts=0
    )
    ours, peft, tuned = (result["contestants"][name] for name in ("ours", "peft", "peft_tuned"))
    assert ours["losses"][0] != ours["losses"][1]
    for peer in (peft, tuned):
        assert peer["losses"] == pytest.approx(ours["losses"], abs=2e-5)
        assert peer["tokens"] == ours["tokens"]
        assert peer["trainable_parameters"] == ours["trainable_parameters"]
    assert all(0 < c["peak_over_model_bytes"] < c["peak_bytes"] for c in (ours, peft, tuned))
    assert ours["time_over_ours"] == 1
    assert process.stderr.count("left out: litgpt: ") == 1 and "Left out: LitGPT (" in table
    assert "| PEFT, tuned |" in table and str(tmp_path) not in table + json.dumps(result)
    assert (tmp_path / "train_speed_cpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.subprocess
def test_fused_projections(tmp_path):
    """Falcon on q and v: PEFT adapts the fused projection whole, so only the first step, where B is 0, is the same."""
    result, _, _ = measure(
        tmp_path, model="falcon-7b", fields=TINY, lora_layers="qv", contestants="ours,peft_tuned", starts=1
    )
    ours, tuned = (result["contestants"][name] for name in ("ours", "peft_tuned"))
    assert tuned["losses"][0] == pytest.approx(ours["losses"][0], abs=2e-5)
    assert tuned["tokens"] == ours["tokens"]
    assert len(ours["start_seconds"]) == len(tuned["start_seconds"]) == 1


def test_flops_are_those_that_torch_counts(monkeypatch):
    """The products of a real step, by torch's count of each."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    from lit_gpt import GPT
    from lit_gpt.data import dataset, packing
    from lit_gpt.kernels import ops
    from lit_gpt.kernels.policy import use_policy
    from lit_gpt.methods import lora

    monkeypatch.setattr(ops, "available", lambda: False)  # torch does not look into them
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from peers.flops import StepFlops

    config = config_from_name("SmolLM2-135M", n_layer=2, n_embd=64, n_head=4, n_query_groups=2, head_size=16,
                              intermediate_size=112, padded_vocab_size=96, vocab_size=96)  # fmt: skip
    adapted = lora.LoRAConfig(r=4, dropout=0.0, key=True, projection=True, mlp=True)
    model = lora.attach(GPT(config), adapted).train()
    samples = [dataset.Sample(torch.arange(n, dtype=torch.int32), torch.ones(n, dtype=torch.uint8)) for n in (20, 31)]
    row = packing.pack(samples)
    products = 0

    class Count(TorchDispatchMode):  # torch's FlopCounterMode cannot look into a gradient taken in a forward pass
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            nonlocal products
            result = op(*args, **(kwargs or {}))
            if op.overloadpacket is torch.ops.aten.mm:
                products += flop_registry[op.overloadpacket](*args, out_val=result)
            if op.overloadpacket is torch.ops.aten.addmm_:  # in place, which torch has no count of
                products += flop_registry[torch.ops.aten.addmm](*args, out_val=result)
            return result

    with use_policy(onednn=False), Count():
        model(row.idx, segments=row.segments, targets=row.targets).backward()
    parts = StepFlops(config, adapted).parts([19, 30], 49)
    attention = parts.pop("attention, forward and backward")
    # nothing trains below the first layer's updates either: the gradients of their inputs are not computed
    spared = 2 * 49 * 3 * 4 * 64
    assert products == sum(parts.values()) - spared
    assert attention == 12 * 2 * 4 * 16 * (19 * 20 // 2 + 30 * 31 // 2)


def test_refuses_what_it_cannot_use(cli, tmp_path):
    cli(SCRIPT).refused("--checkpoint_dir", "--model", code=2)
    cli(SCRIPT, model="falcon-7").refused("falcon-7b")
    cli(SCRIPT, model="falcon-7b", data_dir=tmp_path).refused("--model", code=2)
    cli(SCRIPT, model="falcon-7b", model_fields="{").refused("--model_fields", code=2)
    cli(SCRIPT, model="falcon-7b", contestants="peft").refused("--contestants", "ours", code=2)
    cli(SCRIPT, model="falcon-7b", micro_batch=3).refused("--micro_batch", "divisor", code=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny Llama of four layers, converted."""
    from helpers.tiny_models import tiny_hf_model
    from helpers.tokenizers import bpe_tokenizer
    from lit_gpt.conversion import hf, hf_shards

    folder = tmp_path_factory.mktemp("models") / "tiny"
    fields = dict(vocab_size=320, max_position_embeddings=256, num_hidden_layers=4)
    tiny_hf_model("llama", "llama3", **fields).save_pretrained(folder)
    bpe_tokenizer(folder)
    hf.convert(folder, hf_shards.StoredWeights(folder))
    return folder


@pytest.mark.slow
@pytest.mark.subprocess
def test_the_four_methods(tiny, tmp_path, monkeypatch):
    """Table and pictures, from real runs of the scripts."""
    from helpers.rows import write_rows

    flags = dict(
        checkpoint_dir=tiny, json_path=write_rows(tmp_path / "r.jsonl"), destination_path=tmp_path / "d",
        prompt_style="alpaca", validation_fraction=0.2,
    )  # fmt: skip
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for script, given in (
        ("scripts/prepare_json.py", flags),
        ("benchmarks/methods.py", dict(
            checkpoint_dir=tiny, data_dir=tmp_path / "d", out_dir=tmp_path / "r", steps=2, batch_size=4,
            max_new_tokens=4,
        )),
    ):  # fmt: skip
        argv = [sys.executable, str(ROOT / script), *(f"--{k}={v}" for k, v in given.items())]
        process = subprocess.run(argv, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
    found = json.loads((tmp_path / "r" / "methods_cpu.json").read_text())["methods"]
    assert list(found) == ["adapter", "adapter_v2", "lora", "full"]
    table = (tmp_path / "r" / "methods_cpu.md").read_text()
    assert all(f"{f['trainable_parameters']:,}" in table for f in found.values()) and str(tmp_path) not in table
    for name in ("time", "memory"):
        assert (tmp_path / "r" / f"methods_cpu_{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.subprocess
def test_every_method_is_timed(tiny, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from methods_speed import NAMES

    sizes = dict(samples=2, sample_tokens=48, new_tokens=4, rounds=1)
    flags = dict(checkpoint_dir=tiny, out_dir=tmp_path, **sizes)
    argv = [sys.executable, str(ROOT / "benchmarks/methods_speed.py"), *(f"--{k}={v}" for k, v in flags.items())]
    process = subprocess.run(argv, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    seconds = json.loads((tmp_path / "methods_speed_cpu.json").read_text())["seconds"]
    assert list(seconds["train"]) == NAMES and list(seconds["decode"]) == ["base, or merged", *NAMES]
    table = (tmp_path / "methods_speed_cpu.md").read_text()
    assert "| prefix tuning |" in table and str(tmp_path) not in table


def test_tasks_have_rows_that_differ_and_the_recipe_reads_what_prepare_prints(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from recipe import SETTINGS, finetune_command, table
    from tasks import TASKS, make_rows

    for task in TASKS:
        rows = make_rows(task, 300, seed=1)
        assert rows == make_rows(task, 300, seed=1) != make_rows(task, 300, seed=2)
        assert len({row["input"] for row in rows}) == 300 and all(row["output"] for row in rows)
    said = "wrote d; next: python finetune/lora.py --checkpoint_dir 'a b' --data_dir d --out_dir o --batch_size 4\n"
    assert finetune_command("printed", said, []) == (
        "finetune/lora.py",
        ["--checkpoint_dir", "a b", "--data_dir", "d", "--batch_size", "4"],
    )
    assert finetune_command("ia3", said, ["--data_dir", "d"])[1][:2] == ["--data_dir", "d"]
    cell = {"exact": 0.975, "steps": 95, "seconds": 60.0}
    cells = {f"{task} / 200 / printed / {seed}": cell for task in TASKS for seed in (1, 2)}
    assert "| 200 | printed | 98% (98%, n = 2) |" in table(cells, "Here.") and "printed" in SETTINGS


def test_tips_are_judged_by_what_all_seeds_say(monkeypatch, tmp_path):
    """A difference below twice its standard error is none; runs of the grid and seeds that lack a task do not count."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from quality_page import Cells, draw, page

    def cell(exact, loss, rate=1e-3, machine="2 cores", seconds=5):
        figures = dict.fromkeys(("file_bytes", "probe_loss_first", "probe_loss_last"), 1)
        figures |= {"machine": machine, "seconds": seconds}
        memory = {"step_bytes_planned": 2e6, "step_bytes_measured": 1e6, "trainable_parameters": 1000}
        return figures | memory | {"exact": exact, "val_loss_last": loss, "learning_rate": rate}

    found = {f"LoRA / a / 0 / {rate}": cell(0.5, rate, rate) for rate in (0.1, 0.2, 0.3)}
    for seed, noise in enumerate((-0.02, 0.0, 0.02), 1):
        changes = {"": (0.8, 0.5), ", queries and values alone": (0.6, 0.7), ", SGD": (0.8 + noise, 0.5 - noise)}
        changes |= {", rank 2": (0.9, 0.4), ", alpha the rank": (0.9, 0.6)}
        for name, (exact, loss) in changes.items():
            found |= {f"LoRA{name} / {task} / {seed}": cell(exact, loss) for task in "ab"}
    found["LoRA / a / 4"] = cell(0.0, 9.0)
    found |= {f"LoRA / {task} / 3": cell(0.8, 0.5, machine="8 cores", seconds=1) for task in "ab"}
    cells = Cells(found, ("a", "b"))
    text = page(cells, ["LoRA", "IA3"], ["LoRA, SGD"], "`command`.", 40, "2026-11-29")
    for words in (
        "queries and values alone: held.**", "optimizer matters little: held.**", "2 is too small: did not hold",
        "exact -20.0 ± 0.0 points", "do not agree", "| LoRA | 80% (80, 80; 3) | 0.500 |",
        "| **0.1: 0.100**, 50%; 0.2: 0", "32 runs on 2 cores; 2 runs on 8 cores: seconds and memory are of the former",
        "| 5 | 1 (2) |",
    ):  # fmt: skip
        assert words in " ".join(text.split()), (words, text)
    assert "IA3" not in text
    draw(cells, ["LoRA", "IA3"], tmp_path / "drawn")
    assert {path.name for path in tmp_path.iterdir()} == {"drawn_exact.png", "drawn_loss.png"}


def test_the_grid_of_rates_goes_on_past_an_end(monkeypatch, tmp_path):
    """A method whose best rate is above the three of the grid; what was run once is not run again."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import methods_quality

    ran = []

    def measure(name, data, seed, rate, folder):
        ran.append(rate)
        return {"exact": 1.0, "val_loss_last": abs(rate - 0.01), "seconds": 1, "learning_rate": rate}

    monkeypatch.setattr(methods_quality, "measure", measure)
    monkeypatch.setattr(methods_quality, "prepared", lambda *_: tmp_path)
    for _ in range(2):
        runs = methods_quality.Runs(tmp_path / "cells.json", tmp_path)
        runs.choose_rate("LoRA")
        assert ran == pytest.approx([1e-3 / 3, 1e-3, 3e-3, 9e-3, 27e-3])
    assert runs.cell("1", "tickets", "LoRA")["learning_rate"] == pytest.approx(9e-3)


def test_a_page_of_nothing_is_refused(cli, llama, tmp_path):
    asked = cli("benchmarks/methods_quality.py", checkpoint_dir=llama, out_dir=tmp_path, measure_missing="false")
    asked.refused("methods_quality.json", "measure_missing")


@pytest.mark.slow
@pytest.mark.subprocess
def test_a_hybrid_beside_transformers(tmp_path):
    """The program refuses losses that differ, so that its end says that both do the same work."""
    sizes = dict(hidden_size=64, vocabulary=512, samples=2, sample_tokens=70, new_tokens=8, rounds=2)
    argv = [sys.executable, str(ROOT / "benchmarks/hybrid_speed.py"), *(f"--{k}={v}" for k, v in sizes.items())]
    process = subprocess.run([*argv, f"--out_dir={tmp_path}"], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "hybrid_speed_cpu_fp32.json").read_text())
    assert {len(times) for what in ("train", "decode") for times in result[what]["seconds"].values()} == {2}
    table = (tmp_path / "hybrid_speed_cpu_fp32.md").read_text()
    assert "| training step |" in table and "| decoding |" in table and str(tmp_path) not in table
