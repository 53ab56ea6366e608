"""Finetune a converted checkpoint with Adapter.

    python finetune/adapter.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --data_dir data/alpaca \\
        --out_dir out/adapter/alpaca

Writes lit_model_adapter_finetuned.pth (the prompts and gates alone), metrics.csv, summary.json,
hyperparameters.json and loss.png.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from lit_gpt.cli import Checkpointing, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Quantizer, run

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # converted folder of the base
data_dir: Path = Path("data/alpaca")  # prepared data, from one of the prepare scripts
out_dir: Path = Path("out/adapter/alpaca")  # folder to write
resume: Literal["no", "auto"] = "no"  # auto: go on from the newest state in out_dir, if there is one
# Adapter
adapter_prompt_length: PositiveInt = 10  # learned vectors that each adapted layer attends to
adapter_start_layer: NonNegativeInt = 2  # first layer that is adapted, from 0
# optimization
learning_rate: PositiveFloat = 9e-3  # peak learning rate, reached after warmup_steps
weight_decay: NonNegativeFloat = 0.02  # decoupled, of what trains
warmup_steps: NonNegativeInt = 100  # steps in which the learning rate rises linearly
optimizer: str = "adamw"  # adamw, sgd, adamw8bit, paged_adamw8bit, or another's full name: package.Class
optimizer_args: dict[str, Any] = {}  # its further arguments, as JSON: '{"betas": [0.9, 0.95]}'
schedule: Literal["cosine", "constant"] = "cosine"  # the learning rate after the warmup
epochs: PositiveInt = 1  # times through the data
max_steps: PositiveInt | None = None  # stop after this many optimizer steps instead of epochs
batch_size: PositiveInt = 128  # samples per optimizer step, over all devices
micro_batch_size: PositiveInt | None = None  # samples per packed row (null: as many as micro_batch_tokens hold)
micro_batch_tokens: PositiveInt | None = None  # tokens per packed row (null: 2048 on a CPU, what fits on a GPU)
max_seq_length: PositiveInt | None = None  # refuse data with longer samples (null: what the model takes)
seed: NonNegativeInt = 1337  # of initialization and data order
# devices
precision: Literal["bf16", "fp32"] = "bf16"  # of the frozen weights and the arithmetic; what trains is fp32
quantize: Quantizer | None = None  # keep the frozen weights in fewer bits (null: as stored)
devices: PositiveInt = 1  # on each node
num_nodes: PositiveInt = 1  # machines
strategy: Literal["auto", "ddp", "fsdp", "deepspeed"] = "auto"  # how devices share the work
zero_stage: Literal[2, 3] = 2  # deepspeed: 2 shares out gradients and optimizer state, 3 weights too
zero_offload: bool = False  # deepspeed: keep that in host memory
activation_checkpointing: Checkpointing = "auto"  # what is computed twice to save memory (auto: what has to be)
compile: bool | Literal["auto"] = "auto"  # faster kernels: in C++ on a CPU (auto too), by torch.compile on a GPU
# watching
logger: Literal["csv", "tensorboard", "wandb", "mlflow"] = "csv"  # where the run is followed besides metrics.csv
probe_path: Path | None = None  # .jsonl of texts or messages: their loss is told before and after (null: none)
log_interval: PositiveInt = 1  # steps between rows of metrics.csv
eval_interval: PositiveInt = 100  # steps between validations
eval_samples: PositiveInt | None = 200  # validate on this many samples (null: all)
sample_tokens: NonNegativeInt = 50  # length of the answer shown at each validation
save_interval: PositiveInt = 100  # steps between resume states
keep: PositiveInt = 2  # newest resume states kept, besides the one with the best validation loss


def method(hp: SimpleNamespace) -> Any:
    from lit_gpt.methods import adapter
    from lit_gpt.methods.method import Method

    return Method.of(adapter, adapter.AdapterConfig(hp.adapter_prompt_length, hp.adapter_start_layer))


def main(hp: SimpleNamespace) -> None:
    from lit_gpt.training.setup import finetune

    finetune(hp, method(hp))


if __name__ == "__main__":
    run(main)
