"""Finetune a converted checkpoint, all of its weights.

    python finetune/full.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --data_dir data/alpaca \\
        --out_dir out/full/alpaca

Writes a checkpoint folder like the base's, and into it metrics.csv, summary.json, hyperparameters.json and loss.png.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from lit_gpt.cli import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, run

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # converted folder of the base
data_dir: Path = Path("data/alpaca")  # prepared data, from one of the prepare scripts
out_dir: Path = Path("out/full/alpaca")  # folder to write
resume: Literal["no", "auto"] = "no"  # auto: go on from the newest state in out_dir, if there is one
# optimization
learning_rate: PositiveFloat = 2e-5  # peak learning rate, reached after warmup_steps; falls to 0 along a cosine
weight_decay: NonNegativeFloat = 0.01  # decoupled
warmup_steps: NonNegativeInt = 100  # steps in which the learning rate rises linearly
optimizer: Literal["adamw", "sgd"] = "adamw"  # what takes the steps
epochs: PositiveInt = 1  # times through the data
max_steps: PositiveInt | None = None  # stop after this many optimizer steps instead of epochs
batch_size: PositiveInt = 128  # samples per optimizer step, over all devices
micro_batch_size: PositiveInt | None = None  # samples per packed row (null: as many as micro_batch_tokens hold)
micro_batch_tokens: PositiveInt = 2048  # tokens per packed row, if micro_batch_size is null
max_seq_length: PositiveInt | None = None  # refuse data with longer samples (null: what the model takes)
seed: NonNegativeInt = 1337  # of data order
# devices
precision: Literal["bf16", "fp32"] = "bf16"  # of the arithmetic; the weights are fp32 while they train
devices: PositiveInt = 1  # on each node
num_nodes: PositiveInt = 1  # machines
strategy: Literal["auto", "ddp", "fsdp"] = "auto"  # how devices share the work
activation_checkpointing: bool = False  # keep only each block's input for the backward pass: less memory, slower
# watching
log_interval: PositiveInt = 1  # steps between rows of metrics.csv
eval_interval: PositiveInt = 100  # steps between validations
eval_samples: PositiveInt | None = 200  # validate on this many samples (null: all)
sample_tokens: NonNegativeInt = 50  # length of the answer shown at each validation
save_interval: PositiveInt = 100  # steps between resume states
keep: PositiveInt = 2  # resume states kept


def main(hp: SimpleNamespace) -> None:
    from lit_gpt.train import finetune

    finetune(hp, "full", attach=lambda model: model.requires_grad_(True), settings={}, whole_model=True)


if __name__ == "__main__":
    run(main)
