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
split: Literal["train", "validation"] = "validation"  # of the prepared data
samples: PositiveInt | None = None  # score the first of its samples (null: all)
window: PositiveInt = 2048  # tokens of text read at once, if the model takes as many
context: PositiveInt | None = None  # tokens before each scored one (null: half a window)
precision: Literal["bf16", "fp16", "fp32"] = "bf16"  # of weights and arithmetic
quantize: Quantizer | None = None  # keep the weights in fewer bits (null: as trained, or as stored)
json: bool = False  # print figures as JSON


def main(hp: SimpleNamespace) -> None:
    if bool(hp.text_path) == bool(hp.data_dir):
        raise UsageError("--text_path: expected either it or --data_dir")
    from lit_gpt import variants
    from lit_gpt.generation import default_device, dtype_of
    from lit_gpt.model import GPT
    from lit_gpt.tokenizer import Tokenizer

    place = {"dtype": dtype_of(hp), "device": default_device(), "quantize": hp.quantize}
    tokenizer = Tokenizer(hp.checkpoint_dir)
    if hp.finetuned_path:
        model, _ = variants.load_model(hp.checkpoint_dir, hp.finetuned_path, None, **place)
    else:
        model = GPT.from_checkpoint(hp.checkpoint_dir, **place)
    found = score(hp, model, tokenizer)
    figures = {"perplexity": found.perplexity, "loss": found.loss, "tokens": found.tokens}
    if hp.json:
        print(json_format.dumps(figures))
    else:
        print("perplexity {perplexity:.4f}, loss {loss:.4f} nats per token, over {tokens:,} tokens".format(**figures))


def score(hp: SimpleNamespace, model: Any, tokenizer: Any) -> Any:
    from lit_gpt import data
    from lit_gpt.perplexity import score_data, score_text

    if hp.data_dir:
        data.read_meta(hp.data_dir, tokenizer)
        return score_data(model, data.Dataset(hp.data_dir, hp.split), hp.samples)
    try:
        ids = tokenizer.encode(hp.text_path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text_path {hp.text_path}: cannot be read ({error})") from None
    window = min(hp.window, model.config.block_size)
    return score_text(model, ids, window, hp.context or window // 2)


if __name__ == "__main__":
    run(main)
