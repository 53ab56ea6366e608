"""What a run tells besides its weights: the probe for forgetting, and loggers."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from helpers.runs import metrics
from lit_gpt import Tokenizer
from lit_gpt.data import dataset
from lit_gpt.methods import finetuned_model
from lit_gpt.text.messages import instruction_messages
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.training import checks, loggers

SCRIPT = "finetune/lora.py"
TEXT = "Below is an instruction that describes the cat and the dog. "


@pytest.fixture
def probe(tmp_path) -> Path:
    """A short text, one longer than the model's context, and a conversation."""
    messages = [{"role": "user", "content": "who barks?"}, {"role": "assistant", "content": "the dog"}]
    rows = [{"text": "the cat"}, {"text": TEXT * 25}, {"messages": messages}]
    path = tmp_path / "probe.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def summary(out_dir: Path) -> dict:
    return json.loads((out_dir / "summary.json").read_text())


def test_probe_is_the_loss_on_its_rows_before_and_after(cli, flags, probe, llama, data_dir):
    """Token by token what transformers and the finetuned file give."""
    result = cli(SCRIPT, **flags, probe_path=probe)
    assert result.code == 0, result.err
    tokenizer = Tokenizer(llama)
    style = PromptStyle.from_dict(dataset.read_meta(data_dir, tokenizer)["prompt_style"])
    prompt = style.encode_prompt(instruction_messages("who barks?"), tokenizer)
    short, long = (tokenizer.encode(text) for text in ("the cat", TEXT * 25))
    answered = torch.tensor([*prompt, *tokenizer.encode("the dog").tolist(), tokenizer.eos_id])
    assert len(long) > 256
    pieces = [(short, 1), (long[:256], 1), (long[255:], 1), (answered, len(prompt))]

    def loss(logits_of) -> float:
        losses = []
        with torch.no_grad():
            for ids, start in pieces:
                logits = logits_of(ids[None, :-1])[0, start - 1 :]
                losses.append(F.cross_entropy(logits, ids[start:], reduction="none"))
        return torch.cat(losses).mean().item()

    theirs = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    tuned, _ = finetuned_model.load_finetuned(llama, flags["out_dir"] / "lit_model_lora_finetuned.pth", "lora")
    found = summary(flags["out_dir"])
    assert found["probe_loss_first"] == pytest.approx(loss(lambda idx: theirs(idx).logits), rel=1e-5)
    assert found["probe_loss_last"] == pytest.approx(loss(tuned), rel=1e-5)
    assert found["probe_loss_last"] != pytest.approx(found["probe_loss_first"], rel=1e-2)
    assert f"{found['probe_loss_first']:.3f} -> {found['probe_loss_last']:.3f}, perplexity" in result.out
    # measuring it changes nothing else, and a resumed run remembers how it began
    before = metrics(flags["out_dir"])
    cli(SCRIPT, **flags | {"out_dir": flags["out_dir"].with_name("without")})
    assert metrics(flags["out_dir"].with_name("without")) == before
    assert not any("probe" in name for name in summary(flags["out_dir"].with_name("without")))
    max((flags["out_dir"] / "state").iterdir()).unlink()
    assert "resumed after" in cli(SCRIPT, **flags, probe_path=probe, resume="auto").out
    again = summary(flags["out_dir"])
    assert all(again[name] == found[name] for name in found if name.startswith("probe"))
    max((flags["out_dir"] / "state").iterdir()).unlink()
    probe.write_text('{"text": "the dog"}\n')
    cli(SCRIPT, **flags, probe_path=probe, resume="auto").refused("another probe")


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (None, ["no such file"]),
        ('{"txt": "the cat"}', ["line 1", "'text'"]),
        ('{"text": "a"}', ["no token to predict"]),
        ('{"messages": [{"role": "user"}]}', ["line 1", "role"]),
    ],
)
def test_a_probe_that_cannot_be_read(cli, flags, tmp_path, contents, words):
    path = tmp_path / "p.jsonl"
    if contents:
        path.write_text(contents + "\n")
    cli(SCRIPT, **flags, probe_path=path).refused("p.jsonl", *words)
    assert not flags["out_dir"].exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_refused_at_once(cli, flags, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    cli(SCRIPT, **flags, logger=name).refused(f"--logger {name}", f"pip install -e '.[{name}]'", code=2)
    assert not flags["out_dir"].exists()


class Unreliable:
    """Lightning's own file logger, behind a connection that is lost at step 5."""

    def __init__(self, out_dir, run, step):
        from lightning_fabric.loggers import CSVLogger

        self.real = CSVLogger(out_dir, "elsewhere", "", flush_logs_every_n_steps=1)
        self.log_hyperparams, self.finalize = lambda values: None, self.real.finalize

    def log_metrics(self, values, step):
        if step == 5:
            raise ConnectionError("the server has gone\naway")
        self.real.log_metrics(values, step)


def test_a_logger_that_fails_does_not_end_the_run(cli, flags, monkeypatch, llama):
    monkeypatch.setitem(checks.LOGGERS, "wandb", ())
    monkeypatch.setitem(loggers.OPENERS, "wandb", lambda *arguments: (Unreliable(*arguments), "r1"))
    result = cli(SCRIPT, **flags, logger="wandb")
    assert result.code == 0, result.err
    assert "warning: --logger wandb failed at step 5: ConnectionError: the server has gone away" in result.err
    assert "has nothing from step 5 on" in result.err
    assert [int(row["step"]) for row in metrics(flags["out_dir"])] == list(range(13))
    assert summary(flags["out_dir"])["logger_failed_at_step"] == 5

    def refuse(*arguments):
        raise PermissionError("no API key")

    monkeypatch.setitem(loggers.OPENERS, "wandb", refuse)
    other = flags | {"out_dir": flags["out_dir"].with_name("other")}
    cli(SCRIPT, **other, logger="wandb").refused("--logger wandb", "no API key", "--logger csv")
    assert not (other["out_dir"] / "metrics.csv").exists()  # the folder may be used again


def tensorboard_steps(out_dir: Path) -> tuple[list[int], dict]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out_dir / "tensorboard")).Reload()
    return [event.step for event in events.Scalars("loss")], {"learning_rate": "0.02"}


def mlflow_steps(out_dir: Path) -> tuple[list[int], dict]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient("sqlite:///mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.status == "FINISHED"
    return [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")], run.data.params


def wandb_steps(out_dir: Path) -> tuple[list[int], dict]:
    paths = list((out_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert len(paths) == 2 and len({path.name for path in paths}) == 1  # two parts of one run
    contents = b"".join(path.read_bytes() for path in paths)
    values = dict.fromkeys(("learning_rate", "trainer/global_step"))
    for name in values:  # protocol buffers of key and JSON
        values[name] = re.findall(name.encode() + rb"\x82\x01.([\d.]+)", contents, re.DOTALL)
    # the last is repeated in the run's summary
    steps = {int(step) for step in values["trainer/global_step"]} - {0}
    return [*sorted(steps), 12], {"learning_rate": values["learning_rate"][0].decode()}


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_loggers(cli, flags, monkeypatch, tmp_path, name):
    """The real ones: a resumed run goes on in the same run there, with its hyperparameters."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"an extra: pip install {name}")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    result = cli(SCRIPT, **flags, logger=name)
    assert result.code == 0, result.err
    run = json.loads((flags["out_dir"] / "logger.json").read_text())
    max((flags["out_dir"] / "state").iterdir()).unlink()
    result = cli(SCRIPT, **flags, logger=name, resume="auto")
    assert result.code == 0 and "resumed after step 11" in result.out, result.err
    assert json.loads((flags["out_dir"] / "logger.json").read_text()) == run
    reader = {"tensorboard": tensorboard_steps, "wandb": wandb_steps, "mlflow": mlflow_steps}[name]
    steps, hyperparameters = reader(flags["out_dir"])
    assert sorted(set(steps)) == list(range(1, 13)) and len(steps) == 12 + (name != "tensorboard")
    assert hyperparameters["learning_rate"] == "0.02"
