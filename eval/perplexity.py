"""Perplexity of a checkpoint, finetuned or quantized or neither, on a text file or on prepared data.

    python eval/perplexity.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --text_path my.txt
    python eval/perplexity.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --data_dir data/alpaca \\
        --finetuned_path out/lora/alpaca/lit_model_lora_finetuned.pth

A text is one stream of tokens, read in windows that overlap, so that each token is scored once and after at least
`context` others. Of prepared data the supervised tokens are scored: its loss is the validation loss of a finetune.
"""

import json
from pathlib import Path

from lit_gpt.checkpoints.folder import check_inputs
from lit_gpt.cli import run
from lit_gpt.evaluation.args import PerplexityArgs

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # Read a converted folder, or what finetune/full.py wrote.
finetuned_path: Path | None = None
text_path: Path | None = None
data_dir: Path | None = None


def main(args: PerplexityArgs) -> None:
    check_inputs(args.checkpoint_dir, args.finetuned_path)
    from lit_gpt.evaluation.perplexity import evaluate

    score = evaluate(args)
    if args.json:
        print(json.dumps({"perplexity": score.perplexity, "loss": score.loss, "tokens": score.tokens}))
    else:
        print(f"perplexity {score.perplexity:.4f}, loss {score.loss:.4f} nats per token, over {score.tokens:,} tokens")


if __name__ == "__main__":
    run(main)
