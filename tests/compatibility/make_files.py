"""Write the files of before, with the answers that they gave. To be run at commit 2d5ab8b, and at no other:

    git worktree add ../before 2d5ab8b && cd ../before
    PYTHONPATH=. python PATH/TO/tests/compatibility/make_files.py

It writes `files/` beside this script: a converted and a quantized checkpoint folder of a tiny random Llama, prepared
data, what each finetune script left, the state of a run that was stopped, and `answers.json`.
"""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OLD = Path.cwd()  # the checkout of 2d5ab8b
FILES = Path(__file__).resolve().parent / "files"
WORDS = ("cat", "dog", "cow", "hen", "fox", "owl", "ant", "bee", "elk", "pig")
METHODS = {
    "lora": ["--lora_r", "2", "--lora_mlp", "true"],
    "adapter": ["--adapter_prompt_length", "3", "--adapter_start_layer", "0"],
    "adapter_v2": ["--adapter_prompt_length", "3", "--adapter_start_layer", "0"],
}
# Which inputs dropout strikes is another formula's since: training is compared without it.
EXACT = {"lora": ["--lora_dropout", "0"]}
BASE = ["--checkpoint_dir", "base", "--precision", "fp32"]
TRAIN = [
    *BASE, "--data_dir", "data", "--batch_size", "4", "--micro_batch_size", "2", "--warmup_steps", "0",
    "--learning_rate", "0.01", "--eval_interval", "2",
]  # fmt: skip
SHORT = ["--max_steps", "4"]
STOPPED = [*TRAIN, *METHODS["lora"], "--max_steps", "60", "--eval_interval", "60", "--out_dir", "stopped"]
QUANTIZED = ["--checkpoint_dir", "quantized", "--precision", "fp32"]
MERGED = ["--checkpoint_dir", "merged", "--precision", "fp32"]
MERGE = ["--checkpoint_dir", "base", "--lora_path", "lora.pth", "--out_dir", "merged"]
GREEDY = ["--prompt", "describe the cat", "--temperature", "0", "--max_new_tokens", "12"]
# What is asked of each file; the tests ask the same.
ASKED = {
    "base": ["generate/base.py", *BASE, *GREEDY],
    "quantized": ["generate/base.py", *QUANTIZED, *GREEDY],
    "merged": ["generate/base.py", *MERGED, *GREEDY],
    **{
        method: [f"generate/{method}.py", *BASE, *GREEDY, f"--{method.partition('_')[0]}_path", f"{method}.pth"]
        for method in METHODS
    },
}
SCORED = {
    "base": BASE,
    "quantized": QUANTIZED,
    "merged": MERGED,
    **{method: [*BASE, "--finetuned_path", f"{method}.pth"] for method in METHODS},
}


def make_checkpoint(folder: Path) -> None:
    """Write a tiny random Llama in bf16 with a tokenizer of 300 tokens, as Hugging Face stores them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3).add_(1.0 if parameter.ndim == 1 else 0.0)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    tokenizer.train_from_iterator(["the cat and the dog", "Below is an instruction that describes a task"] * 9, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)


def run(script: str, *flags: str) -> str:
    """Run a script of 2d5ab8b, and return its stdout."""
    command = [sys.executable, OLD / script, *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    assert done.returncode == 0, command
    return done.stdout


def stop_a_run() -> None:
    """Send SIGTERM to a finetune that has taken steps, so that it leaves a state to resume from."""
    process = subprocess.Popen([sys.executable, OLD / "finetune/lora.py", *STOPPED])
    metrics = Path("stopped/metrics.csv")
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.wait()


def losses(out_dir: Path) -> list[list[str]]:
    """Return loss and validation loss of each step."""
    with open(out_dir / "metrics.csv", newline="") as file:
        return [[row["loss"], row["val_loss"]] for row in csv.DictReader(file)]


def make() -> dict:
    """Write all files in the current folder, and return the answers that they gave."""
    make_checkpoint(Path("base"))
    run("scripts/convert_hf_checkpoint.py", "--checkpoint_dir", "base")
    Path("base/model.safetensors").unlink()
    rows = [{"instruction": f"describe the {word}", "input": "", "output": f"the {word} and a dog"} for word in WORDS]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--json_path", "rows.jsonl", "--destination_path", "data", "--validation_fraction", "0.2"]
    run("scripts/prepare_json.py", "--checkpoint_dir", "base", *data)
    run("scripts/quantize.py", "--checkpoint_dir", "base", "--out_dir", "quantized", "--calibration_tokens", "256")
    answers = {"training": {}}
    for method, flags in METHODS.items():
        run(f"finetune/{method}.py", *TRAIN, *SHORT, *flags, "--out_dir", f"exact_{method}", *EXACT.get(method, []))
        answers["training"][method] = losses(Path(f"exact_{method}"))
        run(f"finetune/{method}.py", *TRAIN, *SHORT, *flags, "--out_dir", f"out_{method}")
        shutil.copy(f"out_{method}/lit_model_{method}_finetuned.pth", f"{method}.pth")
        shutil.rmtree(f"out_{method}"), shutil.rmtree(f"exact_{method}")
    run("scripts/merge_lora.py", *MERGE)
    answers["text"] = {name: run(*command) for name, command in ASKED.items()}
    answers["score"] = {
        name: json.loads(run("eval/perplexity.py", *flags, "--data_dir", "data", "--json", "true"))
        for name, flags in SCORED.items()
    }
    shutil.rmtree("merged")  # the tests merge anew
    stop_a_run()
    return answers


if __name__ == "__main__":
    os.environ |= {"PYTHONPATH": str(OLD), "OMP_NUM_THREADS": "1"}
    place = Path(tempfile.mkdtemp())
    os.chdir(place)
    (place / "answers.json").write_text(json.dumps(make(), indent=1) + "\n")
    shutil.rmtree(FILES, ignore_errors=True)
    shutil.copytree(place, FILES)
    shutil.rmtree(place)
