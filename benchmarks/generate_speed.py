"""Speed and memory of generating at batch 1 against what could be used instead, as ratios from one run on one machine.

    python benchmarks/generate_speed.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct \\
        --peers_dir out/peers
    python benchmarks/generate_speed.py --model falcon-7b --contestants ours,ours_compiled,hf,hf_static

Each contestant is a process that holds its model and answers a prompt when it is asked to; they take turns, and in the
same turns the machine's own speed of reading memory is measured, which bounds them: each token needs all weights once.
Writes generate_speed_cpu.json and .md, or with a GPU generate_speed_cuda.*.
"""

import json
import sys
import tempfile
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, Literal

from lit_gpt.cli import PositiveInt, run
from lit_gpt.errors import UsageError

checkpoint_dir: Path | None = None  # converted folder, the downloaded files still in it
model: str | None = None  # instead: random weights of this size, such as falcon-7b
contestants: str = "all"  # who takes part, of the names in TITLES; transformers with a static cache is hf_static
peers_dir: Path | None = None  # where LitGPT's environment lies, or is made (null: LitGPT is left out)
out_dir: Path = Path("benchmarks/results")  # folder for the results
prompt_tokens: PositiveInt = 64  # tokens of the prompt
new_tokens: PositiveInt = 128  # tokens of the answer
rounds: PositiveInt = 5  # answers of each that count, one in each round; the first, in which is compiled, does not
precision: Literal["bf16", "fp32"] = "bf16"  # of weights and arithmetic
litgpt_name: str = "SmolLM2-135M-Instruct"  # what LitGPT calls the model

TITLES = {
    "ours": "Lit-GPT", "ours_compiled": "Lit-GPT, compiled", "ours_compiled_int8": "the same, int8",
    "ours_compiled_lora": "the same, LoRA apart", "ours_compiled_lora_merged": "the same, LoRA merged",
    "ours_compiled_v2": "the same, Adapter v2", "hf": "transformers", "hf_static": "transformers, static and compiled",
    "litgpt": "LitGPT",
}  # fmt: skip


def main(hp: SimpleNamespace) -> None:
    names = list(TITLES) if hp.contestants == "all" else [name.strip() for name in hp.contestants.split(",")]
    if bool(hp.model) == bool(hp.checkpoint_dir):
        raise UsageError("--checkpoint_dir or --model: expected one of them")
    if unknown := set(names) - set(TITLES):
        raise UsageError(f"--contestants: expected any of {', '.join(TITLES)}, got '{', '.join(sorted(unknown))}'")
    from peers.environment import random_model
    from peers.process import Contestant

    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        if hp.model:
            hp.checkpoint_dir, _ = random_model(hp.model, {}, 8, 1337, folder)
        job, pythons = prepare(hp, names, folder)
        running = []
        for name in ("memory", *pythons):
            print(f"loading {name}", file=sys.stderr)
            running.append(Contestant(name, job, folder, pythons.get(name, sys.executable), script="decode.py"))
            stack.callback(running[-1].stop)
            running[-1].ready()
        for n in range(hp.rounds + 1):
            for contestant in running:
                contestant.step(n)
            rates = (f"{c.name} {c.answers[-1]['tokens_per_second']:.1f}" for c in running[1:])
            print(f"round {n} of {hp.rounds}, tokens/s: {', '.join(rates)}", file=sys.stderr)
        report(hp, job, running)


def prepare(hp: SimpleNamespace, names: list[str], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The job, and the interpreter of each contestant."""
    import torch
    from peers import environment

    from lit_gpt import Config

    vocabulary = Config.from_checkpoint(hp.checkpoint_dir).vocab_size
    prompt = torch.randint(vocabulary, (hp.prompt_tokens,), generator=torch.Generator().manual_seed(7)).tolist()
    job = {
        "checkpoint_dir": str(hp.checkpoint_dir.absolute()), "prompt": prompt, "new_tokens": hp.new_tokens,
        "precision": hp.precision, "device": "cuda" if torch.cuda.is_available() else "cpu",
        "weight_bytes": (hp.checkpoint_dir / "lit_model.pth").stat().st_size,
    }  # fmt: skip
    pythons = dict.fromkeys(names, sys.executable)
    if "litgpt" in pythons and not hp.peers_dir:
        del pythons["litgpt"]
        print("left out: litgpt: --peers_dir names a folder to install it into", file=sys.stderr)
    if "litgpt" in pythons:
        pythons["litgpt"] = environment.litgpt_python(hp.peers_dir, torch.__version__)
        where = folder / "litgpt_checkpoint"
        made = environment.litgpt_checkpoint(pythons["litgpt"], hp.checkpoint_dir, where, hp.litgpt_name)
        job["litgpt_dir"] = str(made)
    return job, pythons


def report(hp: SimpleNamespace, job: dict[str, Any], running: list) -> None:
    import torch
    from peers.report import command, machine

    memory, *contestants = running
    reads = [answer["bytes_per_second"] for answer in memory.answers[1:]]
    reference = next((c for c in contestants if c.name == "hf"), contestants[0])
    found = {}
    for c in contestants:
        answers = c.answers[1:]
        pairs = sorted(
            a["tokens_per_second"] / r["tokens_per_second"] for a, r in zip(answers, reference.answers[1:], strict=True)
        )
        found[c.name] = {
            "tokens_per_second": median(a["tokens_per_second"] for a in answers),
            "over_reference": median(pairs), "range": [pairs[0], pairs[-1]],
            "of_bound": median(a["tokens_per_second"] * job["weight_bytes"] / r for a, r in zip(answers, reads,
                                                                                            strict=True)),
            "first_seconds": median(a["first_seconds"] for a in answers),
            "first_answer_seconds": c.answers[0]["first_seconds"] + hp.new_tokens / c.answers[0]["tokens_per_second"],
            "peak_bytes": max(a["peak_bytes"] for a in answers),
            "same_tokens": sum(a == b for a, b in zip(answers[0]["ids"], reference.answers[1]["ids"], strict=True)),
        }  # fmt: skip
    contents = {
        "command": command("generate_speed"), "date": date.today().isoformat(), "torch": torch.__version__,
        "machine": machine(contestants[0].about["threads"]), "reads_bytes_per_second": median(reads),
        "weight_bytes": job["weight_bytes"], "reference": reference.name, "contestants": found,
    }  # fmt: skip
    stem = hp.out_dir / f"generate_speed_{job['device']}"
    hp.out_dir.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(contents, indent=2) + "\n")
    stem.with_suffix(".md").write_text(table(hp, contents))
    print(table(hp, contents))


def table(hp: SimpleNamespace, r: dict[str, Any]) -> str:
    from peers.report import fill

    bound = r["reads_bytes_per_second"] / r["weight_bytes"]
    machine = r["machine"]
    where = machine.get("gpu") or f"{machine['cores']} cores of {machine['cpu']} ({', '.join(machine['extensions'])})"
    rows = "\n".join(
        f"| {TITLES[name]} | {c['tokens_per_second']:.1f} | {c['over_reference']:.2f} ({c['range'][0]:.2f} to "
        f"{c['range'][1]:.2f}) | {c['of_bound']:.0%} | {c['first_seconds']:.2f} s | {c['first_answer_seconds']:.1f} s "
        f"| {c['peak_bytes'] / 1e9:.2f} GB | {c['same_tokens']} |"
        for name, c in r["contestants"].items()
    )
    notes = (
        f"{hp.precision}, a prompt of {hp.prompt_tokens} random tokens, {hp.new_tokens} greedy tokens, medians of "
        f"{hp.rounds} rounds in which all take turns. The bound, {bound:.0f} tokens/s, is what reading "
        f"{r['weight_bytes'] / 1e6:.0f} MB of weights a token allows at {r['reads_bytes_per_second'] / 1e9:.1f} GB/s, "
        "measured in the same rounds; int8 is held against it too. The first answer of a process, which is not among "
        "the medians, includes compiling with what torch's cache on disk holds. Same: how many of the answer's tokens "
        "are the reference's, in place; in bfloat16 a near tie ends the likeness."
    )
    return f"""# Generating at batch 1: {hp.model or hp.checkpoint_dir.name}

`{r["command"]}`

{where}, threads {machine["threads"]}, {machine["memory_gib"]} GiB; torch {r["torch"]}; {r["date"]}.

| | tokens/s | over {TITLES[r["reference"]]} (range) | of bound | first token | first answer | peak memory | same |
|---|---:|---:|---:|---:|---:|---:|---:|
{rows}

{fill(notes)}
"""


if __name__ == "__main__":
    run(main)
