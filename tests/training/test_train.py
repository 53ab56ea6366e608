"""finetune/lora.py from start to end on a tiny model: what it leaves, how it resumes, what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from helpers.cli import run_process, spawn
from helpers.compare import identical
from helpers.paths import ROOT
from helpers.runs import STEPS, final, lora_flags, metrics, wait_for_step
from lit_gpt.checkpoints import folder as checkpoint
from lit_gpt.checkpoints import io
from lit_gpt.methods import finetuned_model
from lit_gpt.training import loop
from lit_gpt.training.batches import Batches
from lit_gpt.training.schedule import Schedule

SCRIPT = "finetune/lora.py"
SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("adapter", "adapter_v2")]


@pytest.fixture(scope="module")
def whole_run(llama, data_dir, tmp_path_factory) -> Path:
    """The folder of a run that nothing interrupted, in a process of its own like those that are compared with it."""
    flags = lora_flags(llama, data_dir, tmp_path_factory.mktemp("whole") / "out")
    assert run_process(SCRIPT, **flags).code == 0
    return flags["out_dir"]


def test_a_run_leaves_its_records(cli, flags, data_dir, llama):
    result = cli(SCRIPT, **flags)
    assert result.code == 0, result.err
    out = flags["out_dir"]
    rows, summary = metrics(out), json.loads((out / "summary.json").read_text())
    assert [int(row["step"]) for row in rows] == list(range(STEPS + 1))
    assert [int(row["step"]) for row in rows if row["val_loss"]] == [0, 5, 10, STEPS]
    assert summary["val_loss_last"] < summary["val_loss_first"] - 0.5
    assert summary["steps"] == STEPS and summary["tokens"] == int(rows[-1]["tokens"])
    assert summary["trainable_parameters"] == sum(t.numel() for t in final(out).values())
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "hyperparameters.json").read_text())["learning_rate"] == 0.02
    assert len(list((out / "state").iterdir())) == 2 and not list(out.glob(".*"))
    # tokens fed: real ones, none of padding, and none that predicts nothing
    from lit_gpt.data import dataset, packing

    lengths, seed = dataset.Dataset(data_dir, "train").lengths, 1337
    fed = (lengths[i] - 1 for s in range(STEPS) for i in packing.step_samples(len(lengths), 6, seed, s, STEPS * 6))
    assert summary["tokens"] == sum(fed)
    # the run can be repeated from its own record
    result = cli(SCRIPT, config=out / "hyperparameters.json", out_dir=out.with_name("again"))
    assert result.code == 0 and identical(final(out), final(out.with_name("again")))


def test_results_are_of_the_flags_not_of_the_cut(cli, flags):
    """Packed rows of any size, checkpointed or not, with kernels or without, give the same weights up to rounding."""
    flags |= {"lora_dropout": 0.0, "optimizer": "sgd"}
    variants = [{}, {"micro_batch_size": 1}, {"micro_batch_tokens": 100, "micro_batch_size": "null"},
                {"activation_checkpointing": "full"}, {"compile": "false"}]  # fmt: skip
    states = []
    for i, change in enumerate(variants):
        out = flags["out_dir"].with_name(f"out{i}")
        assert cli(SCRIPT, **flags | change | {"out_dir": out}).code == 0
        states.append(final(out))
    for other in states[1:]:
        assert all(torch.allclose(states[0][k], other[k], atol=1e-5) for k in other)


class NoReading(TorchDispatchMode):
    """Fails where the host would wait for a device: at what brings numbers out of tensors."""

    READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique", "masked_select", "item")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        assert not name.startswith(self.READS), name
        assert name != "index" or not any(i is not None and i.dtype == torch.bool for i in args[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("script", ["lora", "adapter", "adapter_v2", "full"])
def test_between_logs_nothing_is_read_from_the_device(cli, flags, script, monkeypatch):
    """Only `batch` looks into tensors, those of the data set on the host; and of a step the next is ready."""
    train_step, batch, prepared = loop.Trainer.train_step, Batches.batch, []

    def train_step_unread(run):
        assert run.step == 0 or run.prefetched.step == run.step
        with NoReading(), monkeypatch.context() as patch:
            for name in ("tolist", "numpy", "cpu"):  # which some devices do without an operator
                patch.setattr(torch.Tensor, name, None)
            return train_step(run)

    def batch_reading(batches, step):
        prepared.append(step)
        with _disable_current_modes(), monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", tolist)
            return batch(batches, step)

    tolist = torch.Tensor.tolist
    monkeypatch.setattr(loop.Trainer, "train_step", train_step_unread)
    monkeypatch.setattr(Batches, "batch", batch_reading)
    flags = {k: v for k, v in flags.items() if script == "lora" or not k.startswith("lora")}
    flags |= {"max_steps": 6, "log_interval": 4, "save_interval": 50, "precision": "bf16"}
    flags |= {"adapter_start_layer": 1} if script.startswith("adapter") else {}
    result = cli(f"finetune/{script}.py", **flags)
    assert result.code == 0, result.err
    assert prepared == list(range(7))
    assert [int(row["step"]) for row in metrics(flags["out_dir"]) if row["loss"]] == [4, 5, 6]


@pytest.mark.subprocess
@pytest.mark.parametrize(
    "moment", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(9, marks=pytest.mark.slow)]
)
def test_killed_and_resumed_ends_with_the_same_bits(whole_run, flags, moment):
    """SIGKILL after some steps, wherever it strikes; metrics go on without a seam."""
    killed = flags | {"resume": "auto"}
    process = spawn(SCRIPT, **killed)
    wait_for_step(process, killed["out_dir"], moment)
    process.kill()
    process.communicate()
    assert not (killed["out_dir"] / "lit_model_lora_finetuned.pth").exists()
    had_state = list((killed["out_dir"] / "state").glob("step_*"))  # it may have died before the first was whole
    result = run_process(SCRIPT, **killed)
    assert result.code == 0 and ("resumed after step" in result.out) == bool(had_state), result.err
    assert identical(final(whole_run), final(killed["out_dir"]))
    assert metrics(whole_run) == metrics(killed["out_dir"])


def test_a_truncated_state_is_never_taken_for_whole(cli, flags):
    """The state before it is used, and the end is the same; with none left nothing is overwritten."""
    cli(SCRIPT, **flags)
    whole = final(flags["out_dir"])
    newest, before = sorted((flags["out_dir"] / "state").iterdir(), reverse=True)
    contents = newest.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        newest.write_bytes(contents[: int(torch.randint(len(contents), (), generator=generator))])
        result = cli(SCRIPT, **flags | {"resume": "auto"})
        assert result.code == 0 and f"resumed after step {STEPS - 1}" in result.out, result.out
        assert identical(final(flags["out_dir"]), whole)
    before_metrics = (flags["out_dir"] / "metrics.csv").read_bytes()
    for path in (newest, before):
        path.write_bytes(b"")
    cli(SCRIPT, **flags | {"resume": "auto"}).refused("none of its states is readable")
    assert (flags["out_dir"] / "metrics.csv").read_bytes() == before_metrics


@pytest.mark.subprocess
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_told_to_stop_it_saves_and_says_how_to_go_on(whole_run, flags, number):
    stopped = flags | {"resume": "auto", "save_interval": 1000}
    process = spawn(SCRIPT, **stopped)
    wait_for_step(process, stopped["out_dir"], 2)
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "--resume auto goes on" in out, (out, err)
    assert run_process(SCRIPT, **stopped).code == 0
    assert identical(final(whole_run), final(stopped["out_dir"]))


def test_a_used_folder_and_changed_hyperparameters_are_refused(cli, flags):
    cli(SCRIPT, **flags | {"max_steps": 3})
    before = (flags["out_dir"] / "metrics.csv").read_bytes()
    cli(SCRIPT, **flags | {"max_steps": 3}).refused("already holds a run", "--resume auto")
    for change in ({"learning_rate": 0.1}, {"lora_r": 4}, {"seed": 5}, {"batch_size": 12}):
        name = next(iter(change))
        cli(SCRIPT, **flags | {"max_steps": 3, "resume": "auto"} | change).refused(f"--{name}")
    assert (flags["out_dir"] / "metrics.csv").read_bytes() == before


def test_a_loss_that_is_not_a_number_stops_the_run(cli, flags, llama):
    """The step is named and its batch kept; no resume state holds the broken weights."""
    folder = flags["out_dir"].with_name("broken")
    shutil.copytree(llama, folder)
    state = {name: tensor.clone() for name, tensor in checkpoint.load_state(llama).items()}
    state["ln_f.weight"] *= 1e38
    io.save(folder / "lit_model.pth", state)
    result = cli(SCRIPT, **flags | {"checkpoint_dir": folder})
    result.refused("the loss of step 1", "batch_of_step_1.pth")
    assert len(io.load(flags["out_dir"] / "batch_of_step_1.pth")["samples"]) == 6
    assert not (flags["out_dir"] / "state").exists()


@pytest.mark.parametrize(
    ("change", "words", "code"),
    [
        ({"micro_batch_size": 4}, ["--micro_batch_size 4", "divisor of the 6"], 2),
        ({"warmup_steps": 50}, ["--warmup_steps 50", "12 steps"], 2),
        ({"learning_rate": -1}, ["--learning_rate", "above 0", "-1"], 2),
        ({"lora_r": 0}, ["--lora_r", "above 0"], 2),
        ({"lora_dropout": 1}, ["--lora_dropout", "not including, 1"], 2),
        ({"batch_size": "many"}, ["--batch_size", "whole number"], 2),
        ({"compile": "maybe"}, ["--compile", "true, false, auto", "maybe"], 2),
        ({"activation_checkpointing": "offload"}, ["--activation_checkpointing offload", "try full"], 2),
        ({"optimizer": "adam"}, ["--optimizer adam", "adamw, sgd"], 2),
        ({"lora_rank": 8}, ["unknown flag --lora_rank: here it is --lora_r"], 2),
        ({"lora_query": "false", "lora_value": "false", "lora_mlp": "false"}, ["nothing would be trained"], 2),
        ({"max_seq_length": 10}, ["--max_seq_length 10", "prepare it again"], 1),
        ({"data_dir": "nowhere"}, ["--data_dir nowhere", "prepare_alpaca"], 1),
        ({"checkpoint_dir": "nowhere"}, ["--checkpoint_dir nowhere", "no such folder"], 1),
        ({"out_dir": "/proc/x"}, ["/proc/x"], 1),
        ({"lorra": 8}, ["unknown flag --lorra;"], 2),
        ({"optimizer_args": '{"beta": 1}'}, ["--optimizer_args", "adamw takes no 'beta'", "betas"], 2),
        ({"optimizer_args": '{"betas": [2, 2]}'}, ["--optimizer adamw", "beta"], 2),
        ({"optimizer_args": '{"lr": 2}'}, ["--optimizer_args", "flags of their own"], 2),
        ({"optimizer_args": "fast"}, ["--optimizer_args", "JSON"], 2),
        ({"optimizer": "torch.optim.Adan"}, ["--optimizer torch.optim.Adan", "has no Adan"], 2),
        ({"optimizer": "nowhere.Adan"}, ["--optimizer nowhere.Adan", "pip install nowhere"], 2),
        ({"optimizer": "torch.optim.Rprop"}, ["torch.optim.Rprop", "--weight_decay 0"], 2),
        ({"config": "nowhere.json"}, ["--config nowhere.json"], 2),
    ],
)
def test_refusals(cli, flags, change, words, code):
    cli(SCRIPT, **flags | change).refused(*words, code=code)
    assert not flags["out_dir"].exists()


def test_a_full_disk_keeps_the_last_state(cli, flags, monkeypatch):
    """The write of a resume state fails: the one before it is still there and whole."""
    real, calls = torch.save, []

    def full(contents, path, *args, **kwargs):
        calls.append(path)
        if len(calls) == 4:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        return real(contents, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    cli(SCRIPT, **flags).refused("No space left on device")
    monkeypatch.undo()
    states = sorted(path.name for path in (flags["out_dir"] / "state").iterdir())
    assert states == ["step_00000002.pth", "step_00000003.pth"]
    assert all(io.load(flags["out_dir"] / "state" / name)["resume"]["step"] for name in states)


def test_schedule():
    schedule = Schedule(steps=100, samples=800, warmup=10, peak=1.0)
    rates = [schedule.learning_rate(step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == max(rates) == 1.0 and 0 < rates[99] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[55] == pytest.approx(0.5)
    assert Schedule(steps=1, samples=1, warmup=0, peak=1.0).learning_rate(0) == 1.0


def test_generate_and_merge_what_was_trained(cli, flags, llama, tmp_path):
    """Merged on load, kept apart, and merged to a folder: the same greedy answer, in the finetune's prompt style."""
    assert cli(SCRIPT, **flags).code == 0
    path = flags["out_dir"] / "lit_model_lora_finetuned.pth"
    ask = {"checkpoint_dir": llama, "prompt": "describe the cat 3", "temperature": 0, "precision": "fp32"}
    apart = cli("generate/lora.py", **ask, lora_path=path, merge="false")
    merged = cli("generate/lora.py", **ask, lora_path=path)
    result = cli("scripts/merge_lora.py", checkpoint_dir=llama, lora_path=path, out_dir=tmp_path / "merged")
    assert result.code == 0 and "differ from the unmerged" in result.out, result.err
    folder = cli("generate/base.py", **ask | {"checkpoint_dir": tmp_path / "merged"}, max_new_tokens=100)
    assert apart.code == merged.code == folder.code == 0, folder.err
    assert apart.out == merged.out == folder.out and apart.out.strip()
    cli("scripts/merge_lora.py", checkpoint_dir=llama, lora_path=path, out_dir=tmp_path / "merged").refused("already")
    with pytest.raises(Exception, match="another base"):
        finetuned_model.load_finetuned(tmp_path / "merged", path, "lora")
    assert finetuned_model.load_finetuned(llama, path, "lora")[1]["method"] == "lora"


def test_memory_runs_out_before_the_first_step(cli, flags, monkeypatch, data_dir):
    """The longest packed row is met first, not by chance in the middle of the run."""
    from lit_gpt.data import dataset, packing
    from lit_gpt.training import objectives

    lengths, packed = dataset.Dataset(data_dir, "train").lengths, []

    real = packing.pack

    def pack(samples):
        if len(samples) == 1:  # the dry run before the dry run
            return real(samples)
        packed.append(sum(len(sample.tokens) for sample in samples))
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(objectives, "pack", pack)
    cli(SCRIPT, **flags).refused("out of memory", "--micro_batch_tokens")
    monkeypatch.undo()
    rows = [
        sum(lengths[i] for i in row)
        for step in range(3)
        for row in packing.micro_batches(packing.step_samples(16, 6, 1337, step, 72), lengths, 3, 0)
    ]
    assert packed == [max(rows)] and not (flags["out_dir"] / "state").exists()


SELF_KILLED = """
import os, runpy, signal, sys
from lit_gpt.checkpoints.base_model import load_model
import torch
real, calls = torch.save, []
def save(contents, path, *args, **kwargs):
    calls.append(path)
    real(contents, path, *args, **kwargs)
    if len(calls) == 5:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.subprocess
@pytest.mark.parametrize("method", ["lora", *SLOW, pytest.param("full", marks=pytest.mark.slow)])
def test_killed_inside_a_save(flags, method):
    """What is half-written is never taken for a state, and the end is bit-identical."""
    from helpers.runs import method_flags, weights_of

    script, flags = f"finetune/{method}.py", flags if method == "lora" else method_flags(flags, method)
    assert run_process(script, **flags).code == 0
    killed = flags | {"out_dir": flags["out_dir"].with_name("killed"), "resume": "auto"}
    argv = [sys.executable, "-c", SELF_KILLED, str(ROOT / script), *(f"--{k}={v}" for k, v in killed.items())]
    result = subprocess.run(argv, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert list((killed["out_dir"] / "state").glob(".*.tmp.*"))  # the half that it was writing
    result = run_process(script, **killed)
    assert result.code == 0 and "resumed after step 4" in result.out, result.err
    assert identical(weights_of(flags["out_dir"], method), weights_of(killed["out_dir"], method))
    assert metrics(flags["out_dir"]) == metrics(killed["out_dir"])


def test_the_best_state_stays(cli, flags, llama):
    """Beside the newest; and it generates like a finetuned file."""
    flags |= {
        "eval_interval": 2,
        "save_interval": 2,
        "keep": 1,
        "learning_rate": 1.0,
        "weight_decay": 3.0,
        "schedule": "constant",
        "max_steps": 6,
    }
    result = cli(SCRIPT, **flags)
    validations = {int(row["step"]): float(row["val_loss"]) for row in metrics(flags["out_dir"]) if row["val_loss"]}
    best = min((step for step in validations if step), key=validations.get)
    assert best != 6, validations  # the case of this test: it got worse again
    states = sorted(path.name for path in (flags["out_dir"] / "state").iterdir())
    assert states == [f"step_{best:08d}.pth", "step_00000006.pth"]
    assert f"lowest validation loss, {validations[best]:.3f}" in result.out and states[0] in result.out
    path = flags["out_dir"] / "state" / states[0]
    result = cli("generate/lora.py", checkpoint_dir=llama, lora_path=path, prompt="describe the cat", max_new_tokens=3)
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "sgd", "optimizer_args": '{"momentum": 0.9, "nesterov": true}', "schedule": "constant"},
        {"optimizer": "sgd"},
        {"optimizer": "torch.optim.RAdam", "optimizer_args": '{"betas": [0.8, 0.9]}'},
        {"optimizer": "adamw8bit"},
        {"optimizer": "adamw", "optimizer_in_backward": "true", "micro_batch_size": 6},
    ],
)
def test_optimizers_learn_and_resume(cli, flags, change):
    if change["optimizer"] == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="an extra")
    script = "finetune/full.py" if "optimizer_in_backward" in change else SCRIPT
    flags = {k: v for k, v in flags.items() if script == SCRIPT or not k.startswith("lora")} | change
    assert cli(script, **flags).code == 0
    summary = json.loads((flags["out_dir"] / "summary.json").read_text())
    assert summary["val_loss_last"] < summary["val_loss_first"]
    whole = metrics(flags["out_dir"])
    max((flags["out_dir"] / "state").iterdir()).unlink()
    result = cli(script, **flags | {"resume": "auto"})
    assert result.code == 0 and f"resumed after step {STEPS - 1}" in result.out, result.err
    assert metrics(flags["out_dir"]) == whole


def test_a_step_in_the_backward_pass_is_the_same_step(cli, flags):
    """Bit for bit; and one way's state is taken up by the other."""
    flags = {k: v for k, v in flags.items() if not k.startswith("lora")} | {"micro_batch_size": 6}
    within = flags | {"optimizer_in_backward": "true", "out_dir": flags["out_dir"].with_name("within")}
    assert cli("finetune/full.py", **flags).code == cli("finetune/full.py", **within).code == 0
    expected = io.load(flags["out_dir"] / "lit_model.pth")
    assert identical(expected, io.load(within["out_dir"] / "lit_model.pth"))
    max((within["out_dir"] / "state").iterdir()).unlink()
    result = cli("finetune/full.py", **within | {"optimizer_in_backward": "false", "resume": "auto"})
    assert result.code == 0 and "resumed after" in result.out
    assert identical(expected, io.load(within["out_dir"] / "lit_model.pth"))
    refused = flags | {"optimizer_in_backward": "true", "micro_batch_size": 3}
    cli("finetune/full.py", **refused).refused("--optimizer_in_backward", "--micro_batch_size 6", code=2)


def test_without_master_weights_they_are_of_the_precision(cli, flags):
    flags = {k: v for k, v in flags.items() if not k.startswith("lora")} | {"precision": "bf16"}
    flags |= {"master_weights": "false", "learning_rate": 0.01}
    assert cli("finetune/full.py", **flags).code == 0
    state = io.load(max((flags["out_dir"] / "state").iterdir()))["state"]
    assert all(tensor.dtype == torch.bfloat16 for tensor in state.values())
    summary = json.loads((flags["out_dir"] / "summary.json").read_text())
    assert summary["val_loss_last"] < summary["val_loss_first"]


def test_patience_ends_a_run_and_the_best_is_the_result(cli, flags):
    """It gets worse after its first steps; the result is the state of the lowest loss, and going on changes nothing."""
    flags |= {"eval_interval": 1, "learning_rate": 1.0, "weight_decay": 3.0, "schedule": "constant", "warmup_steps": 0}
    flags |= {"save_interval": 100, "patience": 2, "result": "best", "resume": "auto"}
    result = cli(SCRIPT, **flags)
    losses = {int(row["step"]): float(row["val_loss"]) for row in metrics(flags["out_dir"])}
    lowest, last = min(losses, key=losses.get), max(losses)
    assert result.code == 0 and last < STEPS and last == lowest + 2, (losses, result.err)
    assert f"ended after step {last}: 2 validations without a lower loss" in result.out
    best = min((step for step in losses if step), key=losses.get)
    kept = io.load(flags["out_dir"] / "state" / f"step_{best:08d}.pth")["state"]
    weights = final(flags["out_dir"])
    assert all(torch.equal(weights[name], kept[name]) for name in kept)
    assert cli(SCRIPT, **flags).code == 0 and len(metrics(flags["out_dir"])) == last + 1
    assert all(torch.equal(tensor, weights[name]) for name, tensor in final(flags["out_dir"]).items())


def test_a_metric_judges_a_run(cli, flags, tmp_path):
    """Here it goes up, down and up again, whatever the loss does: best state, patience and result go by it."""
    (tmp_path / "own.py").write_text(
        "seen = []\n"
        "def late(question, wanted, answer):\n"
        "    assert wanted.startswith('the task') and '### Response' in question\n"
        "    seen.append(answer)\n"
        "    return (0.1, 0.5, 0.9, 0.4, 0.3, 0.2)[(len(seen) - 1) // 4]\n"  # four questions
    )
    flags |= {"metric": f"{tmp_path / 'own.py'}:late", "eval_interval": 1, "warmup_steps": 0, "patience": 2}
    result = cli(SCRIPT, **flags | {"result": "best"})
    assert result.code == 0, result.err
    rows = metrics(flags["out_dir"])
    assert [float(row["score"]) for row in rows] == pytest.approx([0.1, 0.5, 0.9, 0.4, 0.3])
    assert "ended after step 4: 2 validations without a higher score" in result.out
    assert "the result is that of step 2, which has the highest score by" in result.out and ", 0.900" in result.out
    kept = io.load(flags["out_dir"] / "state" / "step_00000002.pth")["state"]
    assert all(torch.equal(tensor, kept[name]) for name, tensor in final(flags["out_dir"]).items())
    summary = json.loads((flags["out_dir"] / "summary.json").read_text())
    assert (summary["score_first"], summary["score_last"]) == (0.1, 0.3)
    for metric, words in (
        ("f1", "expected exact"),
        ("exact,json", "eval/answers.py takes several"),
        ("x.py:f", "x.py"),
    ):
        cli(SCRIPT, **flags | {"metric": metric}).refused(f"--metric {metric}", words, code=1 if ":" in metric else 2)
    again = cli(SCRIPT, **flags | {"metric": "exact", "out_dir": tmp_path / "exact"})
    assert again.code == 0 and "score " in again.out, again.err


def test_a_run_that_has_ended_goes_on_if_its_steps_are_raised(cli, flags):
    """On the learning rate of a run of the new length; fewer steps than it has are refused."""
    longer = flags | {"resume": "auto", "max_steps": 8, "warmup_steps": 0, "schedule": "constant"}
    assert cli(SCRIPT, **longer | {"max_steps": 4}).code == 0
    result = cli(SCRIPT, **longer)
    assert "resumed after step 4" in result.out and "goes on to step 8" in result.out, result.err
    assert len(metrics(flags["out_dir"])) == 9
    assert json.loads((flags["out_dir"] / "hyperparameters.json").read_text())["max_steps"] == 8
    cli(SCRIPT, **longer | {"max_steps": 6}).refused("--max_steps 6", "has --max_steps 8")
    # the samples and the rates of these steps are those of one long run, and so are the weights
    assert cli(SCRIPT, **longer | {"out_dir": flags["out_dir"].with_name("once")}).code == 0
    once = final(flags["out_dir"].with_name("once"))
    assert all(torch.equal(tensor, once[name]) for name, tensor in final(flags["out_dir"]).items())
