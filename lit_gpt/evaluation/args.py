"""The arguments of eval/lm_eval_harness.py, as flags. Nothing here imports torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lit_gpt.cli import NonNegativeInt, PositiveInt


@dataclass(frozen=True)
class HarnessArgs:
    """Evaluation"""

    checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # Read a converted folder.
    finetuned_path: Path | None = None  # Attach what finetune/lora.py, ia3.py, adapter.py or adapter_v2.py wrote.
    tasks: str = ""  # Run these tasks or groups of lm-eval, with commas between.
    include_path: Path | None = None  # Read tasks of your own, as YAML, from this folder.
    out: Path = Path("out/lm_eval.json")  # Write the figures to this file.
    num_fewshot: NonNegativeInt | None = None  # Solve so many examples before a question (null: as the task has it).
    limit: PositiveInt | None = None  # Take the first so many rows of each task (null: all).
    apply_chat_template: bool = False  # Render the questions in the prompt style of the checkpoint or the finetune.
    log_samples: bool = False  # Write each row with its answer, too.
    max_seq_length: PositiveInt | None = None  # Cut the beginning of what is longer (null: what the model takes).
    batch_tokens: PositiveInt = 4096  # Compute so many tokens together.
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"  # Keep weights and compute in this.
    seed: NonNegativeInt = 1234  # Seed the choice of examples, and tasks that sample.
