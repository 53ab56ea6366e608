"""Perplexity of a checkpoint, finetuned or quantized or neither, on a text file or on prepared data.

    python eval/perplexity.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --text_path my.txt
    python eval/perplexity.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --data_dir data/alpaca \\
        --finetuned_path out/lora/alpaca/lit_model_lora_finetuned.pth

A text is one stream of tokens, read in windows that overlap, so that each token is scored once and after at least
`context` others. Of prepared data the supervised tokens are scored: its loss is the validation loss of a finetune.
"""

import json as json_format
from pathlib import Path
from typing import Any, Literal

from lit_gpt.checkpoints.folder import check_inputs
from lit_gpt.cli import PositiveInt, Quantizer, run
from lit_gpt.errors import UsageError, UserError

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # Read a converted folder, or what finetune/full.py wrote.
finetuned_path: Path | None = None  # Attach what finetune/lora.py, adapter.py or adapter_v2.py wrote.
text_path: Path | None = None  # Score this UTF-8 text.
data_dir: Path | None = None  # Or score this prepared data.
split: Literal["train", "validation"] | None = None  # Take this split of the prepared data (null: validation).
samples: PositiveInt | None = None  # Score the first of its samples (null: all).
window: PositiveInt | None = None  # Read so many tokens of text at once (null: 2048, or as many as the model takes).
context: PositiveInt | None = None  # Give each scored token so many before it (null: half a window).
precision: Literal["bf16", "fp16", "fp32"] = "bf16"  # Keep weights and compute in this.
quantize: Quantizer | None = None  # Keep the weights in fewer bits (null: as trained, or as stored).
json: bool = False  # Print the figures as JSON.


def main() -> None:
    check_flags()
    check_inputs(checkpoint_dir, finetuned_path)
    from lit_gpt.checkpoints.base_model import load_model
    from lit_gpt.hardware import DTYPES, default_device
    from lit_gpt.methods.finetuned_model import load_finetuned
    from lit_gpt.text.tokenizer import Tokenizer

    source, device = read_source(Tokenizer(checkpoint_dir)), (DTYPES[precision], default_device())
    if finetuned_path:
        model, _ = load_finetuned(checkpoint_dir, finetuned_path, None, *device, quantize)
    else:
        model = load_model(checkpoint_dir, *device, quantize)
    score = score_source(model, source)
    figures = {"perplexity": score.perplexity, "loss": score.loss, "tokens": score.tokens}
    if json:
        print(json_format.dumps(figures))
    else:
        print("perplexity {perplexity:.4f}, loss {loss:.4f} nats per token, over {tokens:,} tokens".format(**figures))


def check_flags() -> None:
    if text_path and data_dir:
        raise UsageError(f"--text_path {text_path}: does not go with --data_dir {data_dir}; leave one out")
    if not text_path and not data_dir:
        raise UsageError("nothing to score: give a text by --text_path, or a folder of prepared data by --data_dir")
    for_text, for_data = {"window": window, "context": context}, {"split": split, "samples": samples}
    source, unused = ("--text_path", for_data) if text_path else ("--data_dir", for_text)
    for name, value in unused.items():
        if value is not None:
            raise UsageError(f"--{name}: is not used by {source}; leave it out")


def read_source(tokenizer: Any) -> Any:
    """Read what to score, before the model is loaded: token ids, or a split of prepared data."""
    from lit_gpt.data.dataset import Dataset, read_meta

    if text_path is None:
        read_meta(data_dir, tokenizer)
        return Dataset(data_dir, split or "validation")
    try:
        ids = tokenizer.encode(text_path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text_path {text_path}: cannot be read ({error})") from None
    if len(ids) < 2:
        raise UserError(f"--text_path {text_path}: holds fewer than two tokens: nothing to predict; give more text")
    return ids


def score_source(model: Any, source: Any) -> Any:
    from lit_gpt.evaluation.perplexity import score_data, score_text

    if data_dir:
        return score_data(model, source, samples)
    length = window or min(2048, model.config.block_size)
    return score_text(model, source, length, context or length // 2)


if __name__ == "__main__":
    run(main)
