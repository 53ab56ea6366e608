"""Four times the context by LongLoRA: how well a model predicts rows of that length, as it was and finetuned.

    python benchmarks/longlora.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct

The text is the source of Python's standard library, cut into rows as long as the new context; the row held out is of
other files. Everything is done by the scripts that a user runs: extend.py stretches the positions, prepare_json.py
makes the rows, finetune/lora.py trains with shifted groups, norms and embeddings included, and eval/perplexity.py
scores with dense attention. The run itself validates on the first tokens of the row held out, which is cheap. An
interrupted command goes on from what lies in work_dir. Writes longlora.json and longlora.md.
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
long_rows: PositiveInt = 2  # Learn from so many rows of that length, a step of each.
short_rows: PositiveInt = 2  # Learn from so many short ones besides, which cost little.
learning_rate: PositiveFloat = 1e-3  # Train at this peak learning rate.
short_tokens: PositiveInt = 2048  # Give a short row so many tokens, and the one that the run itself validates on.

LORA = "--lora_key true --lora_projection true --lora_dropout 0 --train_norms true --train_embeddings both".split()
QUIET = "--batch_size 1 --sample_tokens 0 --eval_interval 1000000 --eval_samples 1 --save_interval 1".split()


INSTRUCTION = "Print sources of Python's standard library."


def main() -> None:
    check_inputs(checkpoint_dir, None)
    extended, tuned = work_dir / "extended", work_dir / "lora"
    if not extended.exists():
        factor = ["--context_factor", str(context_factor)]
        call("scripts/extend.py", "--checkpoint_dir", str(checkpoint_dir), "--out_dir", str(extended), *factor)
    if not (work_dir / "long").exists():
        prepare(extended)
    losses = {"unextended": loss("unextended", ["--checkpoint_dir", str(checkpoint_dir)])}
    places = ["--checkpoint_dir", str(extended), "--data_dir", str(work_dir / "data"), "--out_dir", str(tuned)]
    budget = {"max_steps": long_rows + short_rows, "learning_rate": learning_rate, "attention_group": group}
    if not (tuned / "summary.json").exists():
        flags = [f"--{name}={value}" for name, value in budget.items()]
        call("finetune/lora.py", *places, *LORA, *QUIET, *flags, "--warmup_steps", "0", "--resume", "auto")
    finetuned = ["--checkpoint_dir", str(extended), "--finetuned_path", str(tuned / "lit_model_lora_finetuned.pth")]
    losses["finetuned"] = loss("finetuned", finetuned)
    report(losses, read_json(tuned / "summary.json"))


def prepare(extended: Path) -> None:
    """Write the rows to learn from, a short one to validate on, and the long one held out, each of files of its own."""
    from lit_gpt.model.config import Config
    from lit_gpt.text.tokenizer import Tokenizer

    limit, tokenizer = row_tokens or Config.from_checkpoint(extended).block_size, Tokenizer(extended)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(1).shuffle(files)
    texts: list[str] = []
    while len(texts) < long_rows + short_rows + 1:
        parts, count = [], 0
        while count < limit:  # prepare_json.py cuts off what is too much
            parts.append(files.pop().read_text(encoding="utf-8", errors="replace"))
            count += len(tokenizer.encode(parts[-1]))
        texts.append("\n".join(parts))
    starts = [tokenizer.decode(tokenizer.encode(text)[:short_tokens]) for text in texts[long_rows:]]
    train = texts[:long_rows] + starts[:-1]
    for name, rows in {"train": train, "long": texts[-1:], "data": starts[-1:]}.items():
        with open(work_dir / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for text in rows:
                file.write(json.dumps({"instruction": INSTRUCTION, "output": text}) + "\n")
    for name in ("data", "long"):
        paths = {"data_path": work_dir / "train.jsonl", "validation_path": work_dir / f"{name}.jsonl"}
        flags = paths | {"checkpoint_dir": extended, "out_dir": work_dir / name, "max_seq_length": limit}
        call("scripts/prepare_json.py", *(f"--{flag}={value}" for flag, value in flags.items()))


def loss(name: str, places: list[str]) -> float:
    """Return a model's loss on the long row that is held out, and keep it in work_dir."""
    path = work_dir / f"{name}.json"
    if not path.exists():
        said = call("eval/perplexity.py", *places, "--data_dir", str(work_dir / "long"), "--json", "true")
        write_json(path, json.loads(said))
    return read_json(path)["loss"]


def report(losses: dict[str, float], summary: dict[str, Any]) -> None:
    from peers.report import command, fill
    from recipe import provenance

    tokens = read_json(work_dir / "long" / "data.json")["audit"]["validation"]["length_max"]
    made = {"command": command("longlora"), "model": checkpoint_dir.name, "rows": tokens}
    made = {name: value for name, value in provenance().items() if name != "held_out"} | made
    write_json(out_dir / "longlora.json", made | {"losses": losses, "summary": summary})
    machine = made["machine"]
    planned, measured = (summary[f"step_bytes_{kind}"] / 1e9 for kind in ("planned", "measured"))
    words = {
        "unextended": "as it was, at positions beyond its context",
        "finetuned": f"positions divided by {context_factor:g}, and {summary['steps']} steps of one row each",
    }
    lines = [f"| {words[name]} | {value:.4f} | {math.exp(value):.2f} |" for name, value in losses.items()]
    where = (
        f"{machine['cores']} cores of {machine['cpu']}, {machine['threads']} used; torch {made['torch']}; "
        f"{made['date']}. The row that is scored has {tokens:,} tokens of the source of Python's standard library; "
        f"attention is dense. Learned were {long_rows} rows of that length and {short_rows} of {short_tokens:,} tokens "
        f"of other files: LoRA of rank 8 on all of attention, norms and embeddings "
        f"({summary['trainable_parameters']:,} parameters), with groups of {group:,} tokens at a learning rate of "
        f"{learning_rate:g}."
    )
    rest = (
        f"On the first {short_tokens:,} tokens of that row alone the loss of the stretched model is "
        f"{summary['val_loss_first']:.4f} before training and {summary['val_loss_last']:.4f} after. A step on a long "
        f"row takes {measured:.2f} GB beside the model ({planned:.2f} GB planned); all {summary['steps']} took "
        f"{summary['seconds']:.0f} s. What stretching alone does on the long row was not measured."
    )
    table = "\n".join(["| model | loss | perplexity |", "|---|---:|---:|", *lines])
    title = f"# {context_factor:g} times the context: {made['model']}"
    text = "\n\n".join([title, f"`{made['command']}`", fill(where), table, fill(rest)]) + "\n"
    (out_dir / "longlora.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run(main)
