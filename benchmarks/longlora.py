"""Four times the context by LongLoRA: what rows of that length cost a model before, once stretched, and finetuned.

    python benchmarks/longlora.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct

The text is the source of Python's standard library, cut into rows as long as the new context; the rows held out are of
other files. Everything is done by the scripts that a user runs: extend.py stretches the positions, prepare_json.py
makes the rows, and finetune/lora.py trains with shifted groups, norms and embeddings included, and validates with dense
attention. An interrupted command goes on from what lies in work_dir. Writes longlora.json and longlora.md.
"""

import json
import math
import random
import sysconfig
from pathlib import Path
from typing import Any

from recipe import call

from lit_gpt.checkpoints.folder import check_inputs
from lit_gpt.cli import PositiveFloat, PositiveInt, run
from lit_gpt.files import read_json, write_json

checkpoint_dir: Path = Path("checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct")  # Extend and finetune this.
work_dir: Path = Path("out/longlora")  # Keep the extended checkpoint, the data and the run in this folder.
out_dir: Path = Path("benchmarks/results")  # Write the results to this folder.
context_factor: PositiveFloat = 4.0  # Make the context this many times as long.
row_tokens: PositiveInt | None = None  # Make rows of so many tokens (null: as many as the new context has).
group: PositiveInt = 2048  # Let tokens see so many in training.
steps: PositiveInt = 4  # Take so many steps, each of one row.
learning_rate: PositiveFloat = 1e-3  # Train at this peak learning rate.

LORA = "--lora_key true --lora_projection true --lora_dropout 0 --train_norms true --train_embeddings both".split()
QUIET = "--batch_size 1 --sample_tokens 0 --eval_interval 1000000 --eval_samples 1 --save_interval 1".split()


def main() -> None:
    check_inputs(checkpoint_dir, None)
    extended, data, tuned = work_dir / "extended", work_dir / "data", work_dir / "lora"
    places = ["--checkpoint_dir", str(extended), "--data_dir", str(data), "--out_dir", str(tuned)]
    if not extended.exists():
        factor = ["--context_factor", str(context_factor)]
        call("scripts/extend.py", "--checkpoint_dir", str(checkpoint_dir), "--out_dir", str(extended), *factor)
    if not data.exists():
        prepare(extended, data)
    path = work_dir / "unextended.json"
    if not path.exists():
        write_json(path, {"loss": unextended(data)})
    budget = ["--max_steps", str(steps), "--learning_rate", str(learning_rate), "--attention_group", str(group)]
    call("finetune/lora.py", *places, *LORA, *QUIET, *budget, "--warmup_steps", "0", "--resume", "auto")
    summary = read_json(tuned / "summary.json")
    losses = {"unextended": read_json(path)["loss"], "stretched": summary["val_loss_first"]}
    report(losses | {"finetuned": summary["val_loss_last"]}, summary, max(lengths(data)))


def prepare(extended: Path, data: Path) -> None:
    """Write the rows to learn from, one for each step, and behind them one of other files that is held out."""
    from lit_gpt.model.config import Config
    from lit_gpt.text.tokenizer import Tokenizer

    limit, tokenizer = row_tokens or Config.from_checkpoint(extended).block_size, Tokenizer(extended)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(1).shuffle(files)
    parts: list[list[str]] = [[], []]  # training, held out
    for part, wanted in zip(parts, (steps, 1), strict=True):
        while len(part) < wanted:
            texts, count = [], 0
            while count < limit:  # prepare_json.py cuts off what is too much
                texts.append(files.pop().read_text(encoding="utf-8", errors="replace"))
                count += len(tokenizer.encode(texts[-1]))
            part.append("\n".join(texts))
    for name, part in zip(("train", "held_out"), parts, strict=True):
        rows = [{"instruction": "Print sources of Python's standard library.", "output": text} for text in part]
        (work_dir / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    paths = ["--data_path", str(work_dir / "train.jsonl"), "--validation_path", str(work_dir / "held_out.jsonl")]
    places = ["--checkpoint_dir", str(extended), "--out_dir", str(data)]
    call("scripts/prepare_json.py", *places, *paths, "--max_seq_length", str(limit))


def unextended(data: Path) -> float:
    """Return the loss of the model as it was on the rows held out, at positions beyond those it was trained on."""
    import torch

    from lit_gpt.checkpoints.base_model import load_model
    from lit_gpt.data.dataset import Dataset
    from lit_gpt.evaluation.perplexity import score_data

    return score_data(load_model(checkpoint_dir, torch.bfloat16), Dataset(data, "validation")).loss


def lengths(data: Path) -> list[int]:
    from lit_gpt.data.dataset import Dataset

    return [length for split in ("train", "validation") for length in Dataset(data, split).lengths]


def report(losses: dict[str, float], summary: dict[str, Any], tokens: int) -> None:
    from peers.report import command, fill
    from recipe import provenance

    made = {"command": command("longlora"), "model": checkpoint_dir.name, "rows": tokens}
    made = {name: value for name, value in provenance().items() if name != "held_out"} | made
    write_json(out_dir / "longlora.json", made | {"losses": losses, "summary": summary})
    machine, seconds = made["machine"], summary["seconds"] / summary["steps"]
    planned, measured = (summary[f"step_bytes_{kind}"] / 1e9 for kind in ("planned", "measured"))
    words = {
        "unextended": "as it was, positions beyond its context",
        "stretched": f"positions divided by {context_factor:g}",
        "finetuned": f"and {summary['steps']} steps of one row each",
    }
    rows = [f"| {words[name]} | {loss:.4f} | {math.exp(loss):.3f} |" for name, loss in losses.items()]
    where = (
        f"{machine['cores']} cores of {machine['cpu']}, {machine['threads']} used; torch {made['torch']}; "
        f"{made['date']}. Rows of {tokens:,} tokens from the source of Python's standard library, of which the one "
        f"that is scored is of other files than those learned; dense attention. LoRA of rank 8 on all of attention, "
        f"norms and embeddings train ({summary['trainable_parameters']:,} parameters), with groups of {group:,} tokens."
    )
    memory = (
        f"A step takes {measured:.2f} GB beside the model ({planned:.2f} GB planned) and {seconds:.0f} s, on a machine "
        "that others used too."
    )
    table = ["| model | loss | perplexity |", "|---|---:|---:|", *rows]
    parts = [f"# {context_factor:g} times the context: {made['model']}", f"`{made['command']}`", fill(where)]
    text = "\n\n".join([*parts, "\n".join(table), fill(memory)]) + "\n"
    (out_dir / "longlora.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run(main)
