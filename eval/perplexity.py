"""Perplexity of a checkpoint, finetuned or quantized or neither, on a text file or on prepared data.

    python eval/perplexity.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --text_path my.txt
    python eval/perplexity.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --data_dir data/alpaca \\
        --finetuned_path out/lora/alpaca/lit_model_lora_finetuned.pth

A text is one stream of tokens, read in windows that overlap, so that each token is scored once and after at least
`context` others. Of prepared data the supervised tokens are scored: its loss is the validation loss of a finetune.
"""

import json as json_format
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from lit_gpt.cli import PositiveInt, Quantizer, run
from lit_gpt.errors import UsageError, UserError

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # converted folder, or what finetune/full.py wrote
finetuned_path: Path | None = None  # what finetune/lora.py, adapter.py or adapter_v2.py wrote
text_path: Path | None = None  # UTF-8 text to score
data_dir: Path | None = None  # or prepared data
split: Literal["train", "validation"] | None = None  # of the prepared data (null: validation)
samples: PositiveInt | None = None  # score the first of its samples (null: all)
window: PositiveInt | None = None  # tokens of text read at once (null: 2048, or as many as the model takes)
context: PositiveInt | None = None  # tokens before each scored one (null: half a window)
precision: Literal["bf16", "fp16", "fp32"] = "bf16"  # of weights and arithmetic
quantize: Quantizer | None = None  # keep the weights in fewer bits (null: as trained, or as stored)
json: bool = False  # print figures as JSON


def main(hp: SimpleNamespace) -> None:
    check_flags(hp)
    from lit_gpt.checkpoints.base_model import load_model
    from lit_gpt.generation.engine import dtype_of
    from lit_gpt.hardware import default_device
    from lit_gpt.methods import finetuned_model
    from lit_gpt.text.tokenizer import Tokenizer

    place = {"dtype": dtype_of(hp), "device": default_device(), "quantize": hp.quantize}
    source = read(hp, Tokenizer(hp.checkpoint_dir))
    if hp.finetuned_path:
        model, _ = finetuned_model.load_finetuned(hp.checkpoint_dir, hp.finetuned_path, None, **place)
    else:
        model = load_model(hp.checkpoint_dir, **place)
    found = score(hp, model, source)
    figures = {"perplexity": found.perplexity, "loss": found.loss, "tokens": found.tokens}
    if hp.json:
        print(json_format.dumps(figures))
    else:
        print("perplexity {perplexity:.4f}, loss {loss:.4f} nats per token, over {tokens:,} tokens".format(**figures))


def check_flags(hp: SimpleNamespace) -> None:
    if hp.text_path and hp.data_dir:
        raise UsageError(f"--text_path {hp.text_path}: does not go with --data_dir {hp.data_dir}; leave one out")
    if not hp.text_path and not hp.data_dir:
        raise UsageError("nothing to score: give a text by --text_path, or a folder of prepared data by --data_dir")
    given, others = ("--text_path", ("split", "samples")) if hp.text_path else ("--data_dir", ("window", "context"))
    for name in others:
        if getattr(hp, name) is not None:
            raise UsageError(f"--{name}: is not used by {given}; leave it out")


def read(hp: SimpleNamespace, tokenizer: Any) -> Any:
    """What to score, before the model is loaded: token ids, or a split of prepared data."""
    from lit_gpt.data import dataset

    if hp.data_dir:
        dataset.read_meta(hp.data_dir, tokenizer)
        return dataset.Dataset(hp.data_dir, hp.split or "validation")
    try:
        ids = tokenizer.encode(hp.text_path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text_path {hp.text_path}: cannot be read ({error})") from None
    if len(ids) < 2:
        raise UserError(f"--text_path {hp.text_path}: holds fewer than two tokens: nothing to predict; give more text")
    return ids


def score(hp: SimpleNamespace, model: Any, source: Any) -> Any:
    from lit_gpt.evaluation.perplexity import score_data, score_text

    if hp.data_dir:
        return score_data(model, source, hp.samples)
    window = hp.window or min(2048, model.config.block_size)
    return score_text(model, source, window, hp.context or window // 2)


if __name__ == "__main__":
    run(main)
