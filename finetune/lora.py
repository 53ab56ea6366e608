"""Finetune a converted checkpoint with LoRA.

    python finetune/lora.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --data_dir data/alpaca \\
        --out_dir out/lora/alpaca

Writes lit_model_lora_finetuned.pth (the LoRA weights alone), metrics.csv, summary.json, hyperparameters.json, loss.png.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from lit_gpt.cli import (
    Checkpointing,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Quantizer,
    run,
)

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # converted folder of the base
data_dir: Path = Path("data/alpaca")  # prepared data, from one of the prepare scripts
out_dir: Path = Path("out/lora/alpaca")  # folder to write
resume: Literal["no", "auto"] = "no"  # auto: go on from the newest state in out_dir, if there is one
lora_path: Path | None = None  # begin with these LoRA weights, of the same base and settings (null: new ones)
# LoRA: update each chosen projection by (lora_alpha / lora_r) B A
lora_r: PositiveInt = 8  # rank of the updates
lora_alpha: PositiveFloat = 16  # scale of the updates, divided by lora_r
lora_dropout: Fraction = 0.05  # share of the updates' inputs zeroed in training
lora_query: bool = True  # adapt the attention's queries
lora_key: bool = False  # adapt the attention's keys
lora_value: bool = True  # adapt the attention's values
lora_projection: bool = False  # adapt the attention's output projection
lora_mlp: bool = False  # adapt the MLP's linear layers
lora_head: bool = False  # adapt the output head
# optimization
learning_rate: PositiveFloat = 3e-4  # peak learning rate, reached after warmup_steps
weight_decay: NonNegativeFloat = 0.01  # decoupled, of what trains
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
seed: NonNegativeInt = 1337  # of initialization, data order and dropout
# devices
precision: Literal["bf16", "fp32"] = "bf16"  # of the frozen weights and the arithmetic; what trains is fp32
quantize: Quantizer | None = None  # keep the frozen weights in fewer bits: nf4 is QLoRA's (null: as stored)
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
    from lit_gpt.methods import lora
    from lit_gpt.methods.method import Method

    return Method.of(lora, lora.LoRAConfig.from_flags(hp))


def main(hp: SimpleNamespace) -> None:
    from lit_gpt.training.setup import finetune

    finetune(hp, method(hp))


if __name__ == "__main__":
    run(main)
