"""Contestant: finetune/lora.py itself, run by its own main. Only two things are laid over it: each optimizer step waits
until it is asked for, and A starts as every contestant's does. A step's time includes the loop's records of it."""

import runpy
from pathlib import Path

from lit_gpt import cli

cli.tune_torch()  # as the script does when it is run

from protocol import Worker, set_A  # noqa: E402

worker = Worker()

from lit_gpt.methods import lora  # noqa: E402
from lit_gpt.training import loop, setup  # noqa: E402
from lit_gpt.training.args import TrainArgs  # noqa: E402

FOREVER = 10**6
SCRIPT = Path(__file__).parent.parent.parent / "finetune" / "lora.py"


def flags(job: dict) -> dict:
    everything = str(job["lora_layers"] == "all").lower()
    return {
        **{name: job[name] for name in ("checkpoint_dir", "data_dir", "out_dir", "precision", "batch_size", "seed")},
        **{name: job[name] for name in ("lora_r", "lora_alpha", "lora_dropout", "learning_rate", "weight_decay")},
        **dict.fromkeys(("lora_key", "lora_projection", "lora_mlp"), everything),
        **{
            "schedule": "constant",
            "max_steps": FOREVER,
            "warmup_steps": 0,
            "eval_interval": FOREVER,
            "save_interval": FOREVER,
        },
        **{"eval_samples": 1, "sample_tokens": 0, "micro_batch_tokens": job["row_tokens"]},
        **{"activation_checkpointing": job["activation_checkpointing"], "compile": str(job["compile"]).lower()},
    }


def projections(path: str, job: dict) -> tuple[int, list[str]]:
    """The layer, and what the A of a module is made of."""
    _, layer, module = path.split(".", 2)
    qkv = ["q", "k", "v"] if job["lora_layers"] == "all" else ["q", "v"]
    names = {"attn.qkv": qkv, "attn.proj": ["o"], "mlp.gate_up": ["gate", "up"], "mlp.proj": ["down"]}
    return int(layer), names.get(module, [module.removeprefix("mlp.")])


build, train_step, steps = setup.build, loop.Trainer.train_step, worker.steps()


def build_as_all(*arguments):
    model = build(*arguments)
    for path, layer in lora.lora_layers(model).items():
        set_A(worker.job, layer.lora_A, *projections(path, worker.job))
    worker.loaded(model)
    return model


def train_step_when_asked(trainer):
    if next(steps, None) is None:
        raise SystemExit
    loss, norm, tokens = train_step(trainer)
    worker.result(loss, tokens)
    return loss, norm, tokens


setup.build, loop.Trainer.train_step = build_as_all, train_step_when_asked
script, groups = runpy.run_path(str(SCRIPT)), (lora.LoRAConfig, TrainArgs)
values = cli.parse(script, [f"--{name}={value}" for name, value in flags(worker.job).items()], groups)
script["main"](*(cli.build(group, values) for group in groups))
