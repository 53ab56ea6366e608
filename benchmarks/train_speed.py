"""Speed and memory of LoRA finetuning against what could be used instead, as ratios from one run on one machine.

    python benchmarks/train_speed.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct \\
        --data_dir data/gsm8k --peers_dir out/peers
    python benchmarks/train_speed.py --model falcon-7b --lora_layers qv --contestants ours,peft,peft_tuned \\
        --batch_size 128

Each contestant is a process that holds its model and takes an optimizer step when it is asked to. They take turns, step
by step, so that all meet the same state of the machine; the machine's own rate of matrix products is measured in the
same turns. All get the same tokens in the same order and start from the same adapters.

The checkpoint folder holds both the downloaded and the converted files. With --model it is made, with random weights
and random rows, where temporary files go (TMPDIR), and takes twice the model's size there. All models are held at the
same time: three of Falcon-7B take 45 GB of a GPU before they train. Writes train_speed_cpu.json,
.md and .png, or with a GPU train_speed_cuda.*.
"""

import importlib.util
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from lit_gpt.cli import Checkpointing, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, run
from lit_gpt.errors import UsageError, UserError

checkpoint_dir: Path | None = None  # converted folder, the downloaded files still in it
data_dir: Path | None = None  # prepared data
model: str | None = None  # instead of both: random weights of this size, such as falcon-7b, and random rows
model_fields: str = "{}"  # with --model: fields of config.json that replace its own, as JSON
contestants: str = "ours,peft,peft_tuned,litgpt"  # who takes part
peers_dir: Path | None = None  # where LitGPT's environment lies, or is made (null: LitGPT is left out)
out_dir: Path = Path("benchmarks/results")  # folder for the results
isa: Literal["native", "avx2"] = "native"  # instructions that all may use: this processor's, or a laptop's
steps: PositiveInt = 10  # rounds measured, one optimizer step of each contestant a round
warmup: NonNegativeInt = 2  # rounds before them that are not
starts: NonNegativeInt = 2  # times that each is started alone, to its first step; the quickest counts
# what is trained
lora_layers: Literal["all", "qv"] = "all"  # every linear layer of the blocks, or queries and values
lora_r: PositiveInt = 8  # rank
lora_alpha: PositiveFloat = 16  # scale, divided by lora_r
lora_dropout: Fraction = 0.05  # share of the updates' inputs zeroed; 0 makes the losses comparable step by step
batch_size: PositiveInt = 8  # samples per optimizer step
learning_rate: PositiveFloat = 3e-4  # constant
weight_decay: NonNegativeFloat = 0.01  # of AdamW
precision: Literal["bf16", "fp32"] = "bf16"  # of the frozen weights and the arithmetic
peers_precision: Literal["bf16", "fp32"] | None = None  # of the others, if theirs is faster in another (null: the same)
seed: NonNegativeInt = 1337  # of data order, adapters and random weights
# the cut of a batch
row_tokens: PositiveInt | None = None  # tokens per packed row of ours (null: its default on a CPU, 4096 on a GPU)
activation_checkpointing: Checkpointing = "auto"  # of ours
compile: bool | Literal["auto"] = "auto"  # of ours
micro_batch: PositiveInt = 4  # samples per padded micro-batch of peft
tuned_row: PositiveInt = 4  # samples per packed row of peft_tuned
tuned_compile: bool = False  # torch.compile for peft_tuned
litgpt_micro_batch: PositiveInt = 1  # LitGPT's default
litgpt_name: str = "SmolLM2-135M-Instruct"  # what LitGPT calls the model

KNOWN = ("ours", "peft", "peft_tuned", "litgpt")


def settings() -> dict[str, Any]:
    """Return the values of all flags."""
    return {name: globals()[name] for name in __annotations__}


def main() -> None:
    global checkpoint_dir, data_dir  # random ones may take their place
    names = check()
    from peers.isa import limit

    limit(isa)
    from peers import report
    from peers.environment import random_model

    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        if model:
            rows = (warmup + steps) * batch_size
            made = random_model(model, json.loads(model_fields), rows, seed, folder)
            checkpoint_dir, data_dir = made
        work = Work(folder)
        pythons, left_out = find_peers(names, folder, work.job)
        names = [name for name in names if name in pythons]
        startups = {name: startup(name, work, pythons[name]) for name in names}
        running = []
        for name in ("gemm", *names):
            running.append(work.start(name, pythons.get(name, sys.executable)))
            stack.callback(running[-1].stop)
        for contestant in running:
            contestant.ready()
        idle = race(running, warmup + steps)
        results = report.Results(settings(), work, running, startups, idle, left_out)
    results.write(out_dir)


def check() -> list[str]:
    """Refuse what contradicts itself; the contestants' names."""
    names = list(dict.fromkeys(name.strip() for name in contestants.split(",") if name.strip()))
    unknown = [name for name in names if name not in KNOWN]
    if unknown or "ours" not in names:
        got = f"got '{contestants}'"
        raise UsageError(f"--contestants: expected ours and any of {', '.join(KNOWN[1:])}, {got}")
    if model and (checkpoint_dir or data_dir):
        raise UsageError("--model: makes weights and rows; give it or --checkpoint_dir and --data_dir")
    if not model and not (checkpoint_dir and data_dir):
        raise UsageError("--checkpoint_dir and --data_dir, or --model: expected what to train on what")
    if model:
        check_model()
    for flag in ("micro_batch", "tuned_row", "litgpt_micro_batch"):
        if batch_size % settings()[flag]:
            raise UsageError(f"--{flag} {settings()[flag]}: expected a divisor of --batch_size {batch_size}")
    if not Path("/proc/self/status").exists():
        raise UserError("memory is read from /proc, which only Linux has")
    return names


def check_model() -> None:
    from lit_gpt.families.registry import preset

    preset(model)  # which names the nearest if it is none
    try:
        good = isinstance(json.loads(model_fields), dict)
    except ValueError:
        good = False
    if not good:
        raise UsageError(f"--model_fields: expected JSON such as {{\"num_hidden_layers\": 2}}, got '{model_fields}'")


class Work:
    """What there is to do: the job that every contestant gets, and what it costs."""

    def __init__(self, folder: Path) -> None:
        import torch
        from peers.flops import StepFlops

        from lit_gpt import Config
        from lit_gpt.checkpoints.folder import check_checkpoint_dir
        from lit_gpt.conversion import hf_shards
        from lit_gpt.data import dataset, packing
        from lit_gpt.methods import lora
        from lit_gpt.text.tokenizer import Tokenizer
        from lit_gpt.training.memory.plan import CPU_ROW

        check_checkpoint_dir(checkpoint_dir)
        hf_shards.shard_paths(checkpoint_dir)  # the peers' files
        dataset.read_meta(data_dir, Tokenizer(checkpoint_dir))
        self.folder, self.started = folder, 0
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        # the plan would take the whole GPU, of which the others hold parts
        self.row_tokens = row_tokens or (4096 if self.device == "cuda" else CPU_ROW)
        train, rounds = dataset.Dataset(data_dir, "train"), warmup + steps
        # as train.Run.optimize takes them
        order = [packing.step_samples(len(train), batch_size, seed, n, 10**9) for n in range(rounds)]
        batches = [[train[i] for i in indices] for indices in order]
        contents = [
            [{"ids": s.tokens.tolist(), "supervised": s.supervised.tolist()} for s in batch] for batch in batches
        ]
        (folder / "batches.json").write_text(json.dumps(contents), encoding="utf-8")
        self.lengths = [[len(s.tokens) - 1 for s in batch] for batch in batches]
        self.supervised = [packing.supervised_count(batch) for batch in batches]
        every = lora_layers == "all"
        self.config = Config.from_checkpoint(checkpoint_dir)
        adapted = lora.LoRAConfig(lora_r, lora_alpha, key=every, projection=every, mlp=every)
        count = StepFlops(self.config, adapted)
        self.parts = [count.parts(*step) for step in zip(self.lengths, self.supervised, strict=True)]
        typical = sorted(range(rounds), key=lambda n: sum(self.lengths[n]))[rounds // 2]
        paths = {"checkpoint_dir": checkpoint_dir, "data_dir": data_dir, "batches": folder / "batches.json"}
        self.job: dict[str, Any] = {
            **settings(),
            "row_tokens": self.row_tokens,
            **{name: str(Path(path).absolute()) for name, path in paths.items()},
            **{name: str(value) for name, value in settings().items() if name in ("out_dir", "peers_dir")},
            "device": self.device,
            "shapes": count.shapes(sum(self.lengths[typical]), self.supervised[typical]),
        }

    def job_of(self, name: str) -> dict[str, Any]:
        """The job with a folder to write to that nobody has used."""
        self.started += 1
        own = {"precision": peers_precision} if peers_precision and name.startswith("peft") else {}
        return self.job | own | {"out_dir": str(self.folder / f"{name}_{self.started}")}

    def start(self, name: str, python: Path | str):
        from peers.process import Contestant

        print(f"loading {name}", file=sys.stderr)
        return Contestant(name, self.job_of(name), self.folder, python)


def find_peers(names: list[str], folder: Path, job: dict[str, Any]) -> tuple[dict[str, Path | str], dict[str, str]]:
    """The interpreter of each contestant that can take part, and why the others cannot."""
    pythons: dict[str, Path | str] = {}
    left_out: dict[str, str] = {}
    for name in names:
        missing = [p for p in ("transformers", "peft") if name.startswith("peft") and not importlib.util.find_spec(p)]
        try:
            if missing:
                raise UserError(f"{missing[0]} is not installed; `pip install {missing[0]}`")
            pythons[name] = litgpt(folder, job) if name == "litgpt" else sys.executable
        except UserError as error:
            left_out[name] = str(error)
            print(f"left out: {name}: {error}", file=sys.stderr)
    return pythons, left_out


def litgpt(folder: Path, job: dict[str, Any]) -> Path:
    import torch
    from peers import environment

    if peers_dir is None:
        raise UserError("not installed; --peers_dir names a folder to install it into")
    python = environment.litgpt_python(peers_dir, torch.__version__)
    where = folder / "litgpt_checkpoint"
    job["litgpt_dir"] = str(environment.litgpt_checkpoint(python, checkpoint_dir, where, litgpt_name))
    return python


def startup(name: str, work: Work, python: Path | str) -> list[float]:
    from peers.process import seconds_to_first_step

    if starts:
        print(f"starting {name} alone", file=sys.stderr)
    return [seconds_to_first_step(name, work.job_of(name), work.folder, python) for _ in range(starts)]


def race(running: list, rounds: int) -> list[float]:
    """One step of each in turn. Returns for each round which share of one core those who waited used."""
    idle = []
    for n in range(rounds):
        start, waited = time.perf_counter(), 0.0
        for contestant in running:
            others = [other for other in running if other is not contestant]
            before = sum(other.cpu_seconds() for other in others)
            contestant.step(n)
            waited += sum(other.cpu_seconds() for other in others) - before
        idle.append(waited / (time.perf_counter() - start))
        took = ", ".join(f"{c.name} {c.answers[-1]['seconds']:.2f} s" for c in running)
        print(f"round {n + 1} of {rounds}: {took}", file=sys.stderr)
    return idle


if __name__ == "__main__":
    run(main)
