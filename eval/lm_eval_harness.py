"""Evaluate a checkpoint, or a finetuned one, on tasks of EleutherAI's lm-evaluation-harness.

    pip install -e '.[eval]'
    python eval/lm_eval_harness.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --tasks hellaswag,gsm8k
    python eval/lm_eval_harness.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --tasks hellaswag,gsm8k \\
        --finetuned_path out/lora/alpaca/lit_model_lora_finetuned.pth --out out/lora/alpaca/lm_eval.json

Prints a table and writes the figures as JSON. Tasks bring their data from the Hugging Face hub, or from your own files.
"""

from pathlib import Path

from lit_gpt.checkpoints.folder import check_inputs
from lit_gpt.cli import run
from lit_gpt.evaluation.args import HarnessArgs
from lit_gpt.files import check_out_file

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")
finetuned_path: Path | None = None
tasks: str = ""
out: Path = Path("out/lm_eval.json")


def main(args: HarnessArgs) -> None:
    from lit_gpt.errors import require

    require("lm_eval", "eval", "eval/lm_eval_harness.py")
    check_inputs(args.checkpoint_dir, args.finetuned_path)
    check_out_file(args.out)
    from lit_gpt.evaluation.lm_eval_model import evaluate

    evaluate(args)


if __name__ == "__main__":
    run(main, aliases={"out_path": "out"})
