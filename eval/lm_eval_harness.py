"""Evaluate a checkpoint, or a finetuned one, on tasks of EleutherAI's lm-evaluation-harness.

    pip install "lit-gpt[eval]"
    python eval/lm_eval_harness.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --tasks hellaswag,gsm8k
    python eval/lm_eval_harness.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --tasks hellaswag,gsm8k \\
        --finetuned_path out/lora/alpaca/lit_model_lora_finetuned.pth --out_path out/lora/alpaca/lm_eval.json

Prints a table and writes the figures as JSON. Tasks bring their data from the Hugging Face hub, or from your own files.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from lit_gpt.cli import NonNegativeInt, PositiveInt, run

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # converted folder, or what finetune/full.py wrote
finetuned_path: Path | None = None  # what finetune/lora.py, adapter.py or adapter_v2.py wrote
tasks: str = ""  # names of tasks or groups of lm-eval, with commas between
include_path: Path | None = None  # folder with tasks of your own, as YAML
out_path: Path = Path("out/lm_eval.json")  # file to write
num_fewshot: NonNegativeInt | None = None  # solved examples before each question (null: as the task has it)
limit: PositiveInt | None = None  # the first so many rows of each task (null: all)
apply_chat_template: bool = False  # render the questions in the prompt style of the checkpoint or the finetune
log_samples: bool = False  # write each row with its answer, too
max_seq_length: PositiveInt | None = None  # cut the beginning of what is longer (null: what the model takes)
batch_tokens: PositiveInt = 4096  # tokens computed together
precision: Literal["bf16", "fp16", "fp32"] = "bf16"  # of weights and arithmetic
seed: NonNegativeInt = 1234  # of the choice of examples, and of tasks that sample


def main(hp: SimpleNamespace) -> None:
    from lit_gpt.errors import require

    require("lm_eval", "lm-eval", "eval/lm_eval_harness.py")
    from lit_gpt.evaluation.lm_eval_model import evaluate

    evaluate(hp)


if __name__ == "__main__":
    run(main)
