"""The arguments of the eval scripts, as flags. Nothing here imports torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lit_gpt.cli import Device, NonNegativeInt, PositiveInt, Quantizer
from lit_gpt.errors import UsageError


@dataclass(frozen=True)
class HarnessArgs:
    """Evaluation"""

    checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # Read a converted folder.
    finetuned_path: Path | None = None  # Attach what a script of finetune/ wrote.
    tasks: str = ""  # Run these tasks or groups of lm-eval, with commas between.
    include_path: Path | None = None  # Read tasks of your own, as YAML, from this folder.
    out: Path = Path("out/lm_eval.json")  # Write the figures to this file.
    num_fewshot: NonNegativeInt | None = None  # Solve so many examples before a question (null: as the task has it).
    limit: PositiveInt | None = None  # Take the first so many samples of each task (null: all).
    apply_chat_template: bool = False  # Render the questions in the prompt style of the checkpoint or the finetune.
    log_samples: bool = False  # Write each sample with its answer, too.
    max_seq_length: PositiveInt | None = None  # Cut the beginning of what is longer (null: what the model takes).
    batch_tokens: PositiveInt = 4096  # Compute so many tokens together.
    device: Device = "auto"
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"  # Keep weights and compute in this.
    seed: NonNegativeInt = 1234  # Seed the choice of examples, and tasks that sample.


@dataclass(frozen=True)
class PerplexityArgs:
    """Evaluation

    Raises:
        UsageError: there is not exactly one thing to score, or a flag of the other is given.
    """

    checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # Read this converted folder.
    finetuned_path: Path | None = None  # Attach what finetune/lora.py, adapter.py or adapter_v2.py wrote.
    text_path: Path | None = None  # Score this UTF-8 text.
    data_dir: Path | None = None  # Or score this prepared data.
    split: Literal["train", "validation"] | None = None  # Take this split of the prepared data (null: validation).
    samples: PositiveInt | None = None  # Score the first of its samples (null: all).
    window: PositiveInt | None = None  # Read so many tokens of text at once (null: 2048, or what the model takes).
    context: PositiveInt | None = None  # Give each scored token so many before it (null: half a window).
    device: Device = "auto"
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"  # Keep weights and compute in this.
    quantize: Quantizer | None = None  # Keep the weights in fewer bits (null: as trained, or as stored).
    json: bool = False  # Print the figures as JSON.

    def __post_init__(self) -> None:
        if self.text_path and self.data_dir:
            raise UsageError(
                f"--text_path {self.text_path}: does not go with --data_dir {self.data_dir}; leave one out"
            )
        if not self.text_path and not self.data_dir:
            raise UsageError("nothing to score: give a text by --text_path, or a folder of prepared data by --data_dir")
        source, unused = "--data_dir", {"window": self.window, "context": self.context}
        if self.text_path:
            source, unused = "--text_path", {"split": self.split, "samples": self.samples}
        for name, value in unused.items():
            if value is not None:
                raise UsageError(f"--{name}: is not used by {source}; leave it out")
