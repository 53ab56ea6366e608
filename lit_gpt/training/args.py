"""Defines the arguments of a finetuning run, by group. Every field is a flag of all finetune scripts (see lit_gpt.cli).

Nothing here imports torch. The groups are frozen: what a run changes on its way, it keeps elsewhere.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lit_gpt.cli import Checkpointing, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Quantizer
from lit_gpt.distributed.args import DeviceArgs

ALIASES = {"lora_path": "finetuned_path", "keep": "keep_states"}  # spellings of before

# Short names; any other optimizer that is installed goes by its own, package.module.Class.
OPTIMIZERS = {
    "adamw": "torch.optim.AdamW",
    "sgd": "torch.optim.SGD",
    "galore": "lit_gpt.training.optimizers.GaLore",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "paged_adamw8bit": "bitsandbytes.optim.PagedAdamW8bit",
}


@dataclass(frozen=True)
class PathArgs:
    """Paths"""

    checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # Read the base from this converted folder.
    data_dir: Path = Path("data/alpaca")  # Read prepared data, from one of the prepare scripts.
    out_dir: Path = Path("out/finetune")  # Write to this folder.
    resume: Literal["no", "auto"] = "no"  # Continue from the newest state in out_dir, if there is one (auto).
    finetuned_path: Path | None = None  # Start from these weights, of the same base and settings (null: from new ones).


@dataclass(frozen=True)
class OptimizationArgs:
    """Optimization"""

    objective: str = "sft"  # Train for this: sft is the cross-entropy of the supervised tokens.
    learning_rate: PositiveFloat = 3e-4  # Set the peak learning rate, reached after warmup_steps.
    min_lr: NonNegativeFloat = 0.0  # Let the cosine end at this learning rate.
    weight_decay: NonNegativeFloat = 0.01  # Decay what trains, decoupled from the gradient.
    warmup_steps: NonNegativeInt | None = None  # Raise the learning rate over these steps (null: 100, at most a third).
    schedule: Literal["cosine", "constant"] = "cosine"  # Choose how the learning rate goes on after the warmup.
    optimizer: str = "adamw"  # Use adamw, sgd, galore, adamw8bit, paged_adamw8bit, or another one's package.Class.
    optimizer_args: dict[str, Any] = field(default_factory=dict)  # Pass it more arguments: '{"betas": [0.9, 0.95]}'.
    optimizer_in_backward: bool = False  # Step as gradients come, holding one at a time; one packed row makes a step.
    max_grad_norm: PositiveFloat | None = None  # Clip the gradient of all that trains to this norm (null: never).
    neftune_alpha: NonNegativeFloat = 0.0  # Add noise of this size to the embeddings in training (NEFTune: 5 to 15).
    attention_group: PositiveInt | None = None  # Let tokens see so many in training, half the heads shifted (LongLoRA).
    epochs: PositiveFloat = 1  # Go through the data this many times; 0.5 is half of it.
    max_steps: PositiveInt | None = None  # Stop after this many optimizer steps instead of epochs.
    seed: NonNegativeInt = 1337  # Seed initialization, data order and dropout.


@dataclass(frozen=True)
class BatchArgs:
    """Batches"""

    batch_size: PositiveInt = 128  # Take this many samples per optimizer step, over all devices.
    micro_batch_size: PositiveInt | None = None  # Pack this many samples together (null: by micro_batch_tokens).
    micro_batch_tokens: PositiveInt | None = None  # Fill packed rows to this (null: 2048 on a CPU, else what fits).
    max_seq_length: PositiveInt | None = None  # Refuse data with longer samples (null: longer than the model takes).


@dataclass(frozen=True)
class MemoryArgs:
    """Precision and memory"""

    precision: Literal["bf16", "fp16", "fp32"] = "bf16"  # Keep frozen weights and compute in this; what trains is fp32.
    quantize: Quantizer | None = None  # Keep the frozen weights in fewer bits; nf4 is QLoRA's (null: as stored).
    activation_checkpointing: Checkpointing = "auto"  # Compute this much twice to save memory (auto: what must be).
    compile: bool | Literal["auto"] = "auto"  # Use C++ on a CPU (auto: where it is faster), torch.compile on a GPU.


@dataclass(frozen=True)
class WatchArgs:
    """Watching"""

    logger: Literal["csv", "tensorboard", "wandb", "mlflow"] = "csv"  # Follow the run here, besides metrics.csv.
    probe_path: Path | None = None  # Measure the loss on these texts or messages (.jsonl) before and after.
    log_interval: PositiveInt = 1  # Write a row of metrics.csv every so many steps.
    eval_interval: PositiveInt = 100  # Validate every so many steps.
    eval_samples: PositiveInt | None = 200  # Validate on this many samples (null: all).
    sample_tokens: NonNegativeInt = 50  # Show an answer of this length at each validation.
    metric: str | None = None  # Judge by answers: exact, contains, json, number, FILE.py:FUNCTION (null: the loss).
    patience: PositiveInt | None = None  # Stop after this many validations that are no better (null: never).
    result: Literal["last", "best"] = "last"  # Write the last step's weights, or those of the best validation.
    save_interval: PositiveInt = 100  # Save a resume state every so many steps.
    keep_states: PositiveInt = 2  # Keep this many of the newest resume states, and the best by validation loss.
    check: bool = False  # Check before step 1 that the run is what it claims, as scripts/check.py does.
    profile_steps: NonNegativeInt = 0  # Write a trace of this many steps to out_dir, which Perfetto opens.


@dataclass(frozen=True)
class TrainArgs:
    """Finetuning"""

    paths: PathArgs = PathArgs()
    optimization: OptimizationArgs = OptimizationArgs()
    batch: BatchArgs = BatchArgs()
    devices: DeviceArgs = DeviceArgs()
    memory: MemoryArgs = MemoryArgs()
    watch: WatchArgs = WatchArgs()
