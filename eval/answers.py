"""Score the answers of a finetune, beside those of its base, by a task's own metric.

    python eval/answers.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --data_dir data/alpaca \\
        --finetuned_path out/lora/alpaca/lit_model_lora_finetuned.pth --metric exact,contains

Answers the validation split of prepared data, or the rows of a file (--data_path), with the likeliest tokens. Prints a
table, and writes the answers that miss by the first metric to a file to read.
"""

import json as json_format
from pathlib import Path
from typing import Any, Literal

from lit_gpt.checkpoints.folder import check_inputs
from lit_gpt.cli import Device, PositiveInt, Quantizer, run
from lit_gpt.data.args import ColumnArgs
from lit_gpt.data.folder import read_record
from lit_gpt.data.sources import parse_sources
from lit_gpt.errors import UsageError
from lit_gpt.files import check_out_file
from lit_gpt.text.metrics import MetricArgs

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # Read a converted folder, or what finetune/full.py wrote.
finetuned_path: Path | None = None  # Attach what a script of finetune/ wrote.
base_dir: Path | None = None  # Compare with this checkpoint (null: checkpoint_dir with nothing attached).
compare: bool = True  # Answer with the base, too.
data_dir: Path | None = None  # Answer this prepared data.
split: Literal["train", "validation"] = "validation"  # Take this split of it.
data_path: str | None = None  # Or answer these rows, as scripts/prepare_json.py reads them.
samples: PositiveInt | None = None  # Answer the first so many (null: all).
max_new_tokens: PositiveInt | None = None  # Answer with at most so many tokens (null: twice the longest wanted answer).
device: Device = "auto"
precision: Literal["bf16", "fp16", "fp32"] = "bf16"  # Keep weights and compute in this.
quantize: Quantizer | None = None  # Keep the weights in fewer bits (null: as trained, or as stored).
out: Path = Path("out/misses.jsonl")  # Write the answers that miss to this file.
json: bool = False  # Print the figures as JSON.


def main(args: MetricArgs, columns: ColumnArgs) -> None:
    metrics = args.metrics()
    check_flags()
    from lit_gpt.checkpoints.base_model import BaseCheckpoint
    from lit_gpt.evaluation.answers import Scores, write_misses

    base = BaseCheckpoint.open(checkpoint_dir, quantize)
    models = dict(open_models(base))
    questions, stop_ids = read_questions(base, columns)
    scores = Scores.of(
        questions, {n: answer(n, load, base, questions, stop_ids) for n, load in models.items()}, metrics
    )
    write_misses(out, misses := scores.misses())
    if json:
        print(json_format.dumps({"questions": len(questions), "misses": len(misses), **scores.means()}, indent=2))
        return
    print(scores.table())
    first = next(iter(scores.means()))
    print(f"{len(questions)} questions, {len(misses)} misses by {first}; they are in {out}")


def check_flags() -> None:
    if bool(data_dir) == bool(data_path):
        given = "two kinds of questions" if data_dir else "nothing to answer"
        raise UsageError(f"{given}: give either prepared data by --data_dir, or rows by --data_path")
    check_inputs(checkpoint_dir, finetuned_path)
    check_out_file(out)
    if base_dir:
        check_inputs(base_dir)
    if data_dir:
        read_record(data_dir)
    for source in parse_sources(data_path) if data_path else ():
        source.check()


def open_models(base: Any) -> Any:
    """Yield the name of each model with what loads it, one after another: memory holds one at a time."""
    from lit_gpt.checkpoints.base_model import BaseCheckpoint
    from lit_gpt.hardware import DTYPES, choose_device
    from lit_gpt.methods.finetuned_model import build_finetuned

    place = (DTYPES[precision], choose_device(device))
    if compare and (base_dir or finetuned_path):
        other = BaseCheckpoint.open(base_dir, quantize) if base_dir else base
        yield "base", lambda: other.build(*place)
    if finetuned_path:
        yield "finetuned", lambda: build_finetuned(base, finetuned_path, None, *place)[0]
    else:
        yield "finetuned" if base_dir else "answers", lambda: base.build(*place)


def read_questions(base: Any, columns: ColumnArgs) -> Any:
    """Return the questions, and the tokens that end an answer. All models read the same tokens."""
    from lit_gpt.data.dataset import read_meta
    from lit_gpt.evaluation.answers import prepared_questions, row_questions
    from lit_gpt.methods.finetuned_file import read_file
    from lit_gpt.text.prompt_style import PromptStyle

    if data_dir:
        style = PromptStyle.from_dict(read_meta(data_dir, base.tokenizer)["prompt_style"])
        return prepared_questions(data_dir, split, base.tokenizer)[:samples], style.stop_ids
    style = base.prompt_style
    if finetuned_path:
        style = PromptStyle.from_dict(read_file(finetuned_path, None, base.fingerprint)["prompt_style"])
    return row_questions(data_path, columns, base.tokenizer, style)[:samples], style.stop_ids


def answer(name: str, load: Any, base: Any, questions: Any, stop_ids: Any) -> list[str]:
    from lit_gpt.evaluation.answers import answer_all

    tokens = max_new_tokens or 2 * max(question.wanted_tokens for question in questions)
    return answer_all(load(), questions, base.tokenizer, stop_ids, tokens, name)


if __name__ == "__main__":
    run(main)
