"""Speed and memory of generating against what could be used instead, as ratios from one run on one machine.

    python benchmarks/generate_speed.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct \\
        --peers_dir out/peers
    python benchmarks/generate_speed.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct \\
        --batch_size 8 --contestants ours,ours_int8,ours_lora,hf
    python benchmarks/generate_speed.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct \\
        --peer_python out/peers/xllamacpp/bin/python --contestants ours,ours_int8,ours_int4,llama,llama_q8_0,llama_q4_0
    python benchmarks/generate_speed.py --model falcon-7b --contestants ours_compiled,ours_compiled_int8,hf,hf_static

Each contestant is a process that holds its model and answers the prompts when it is asked to. They take turns, and
before each turn the machine's own speed of reading memory is measured, which bounds them: each turn needs all weights
once. Writes generate_speed_cpu.json and .md, or with a GPU generate_speed_cuda.*, of several prompts with _batchN.
"""

import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, Literal

from lit_gpt.cli import PositiveInt, run
from lit_gpt.errors import UsageError

checkpoint_dir: Path | None = None  # converted folder, the downloaded files still in it
model: str | None = None  # instead: random weights of this size, such as falcon-7b
contestants: str = "all"  # who takes part, of the names in TITLES; transformers with a static cache is hf_static
peers_dir: Path | None = None  # where LitGPT's environment lies, or is made (null: LitGPT is left out)
peer_python: Path | None = None  # interpreter that has xllamacpp or llama-cpp-python (null: llama.cpp is left out)
out_dir: Path = Path("benchmarks/results")  # folder for the results
isa: Literal["native", "avx2"] = "native"  # instructions that all may use: this processor's, or a laptop's
batch_size: PositiveInt = 1  # prompts that are answered together
prompt_tokens: PositiveInt = 64  # tokens of a prompt
new_tokens: PositiveInt = 128  # tokens of an answer
rounds: PositiveInt = 5  # answers of each that count, one in each round; a first one, that compiles, does not
precision: Literal["bf16", "fp32"] = "bf16"  # of weights and arithmetic
litgpt_name: str = "SmolLM2-135M-Instruct"  # what LitGPT calls the model

TITLES = {
    "ours": "Lit-GPT", "ours_int8": "int8", "ours_int4": "int4", "ours_nf4": "NF4", "ours_lora": "LoRA apart",
    "ours_lora_merged": "LoRA merged", "ours_adapter": "Adapter", "ours_v2": "Adapter v2",
    "ours_eager": "by torch's operators", "ours_compiled": "compiled", "ours_compiled_int8": "compiled, int8",
    "hf": "transformers", "hf_static": "transformers, static and compiled", "litgpt": "LitGPT",
    "llama": "llama.cpp", "llama_q8_0": "llama.cpp, q8_0", "llama_q4_0": "llama.cpp, q4_0",
}  # fmt: skip
ALL = [name for name in TITLES if "compiled" not in name]
FORMATS = ("int8", "int4", "nf4")
PEERS = {"ours_int8": "llama_q8_0", "ours_int4": "llama_q4_0", "ours_nf4": "llama_q4_0"}  # of as many bits


def main() -> None:
    global checkpoint_dir  # a random model takes its place
    names = ALL if contestants == "all" else [name.strip() for name in contestants.split(",")]
    if bool(model) == bool(checkpoint_dir):
        raise UsageError("--checkpoint_dir or --model: expected one of them")
    if unknown := set(names) - set(TITLES):
        raise UsageError(f"--contestants: expected any of {', '.join(TITLES)}, got '{', '.join(sorted(unknown))}'")
    from peers.isa import limit

    limit(isa)
    from peers.environment import random_model
    from peers.process import Contestant

    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        if model:
            checkpoint_dir, _ = random_model(model, {}, 8, 1337, folder)
        job, pythons = prepare(names, folder)
        running = []
        for name in ("memory", *pythons):
            print(f"loading {name}", file=sys.stderr)
            script = "llama.py" if name.startswith("llama") else "decode.py"
            running.append(Contestant(name, job, folder, pythons.get(name, sys.executable), script=script))
            stack.callback(running[-1].stop)
            running[-1].ready()
        memory, *answering = running
        for n in range(rounds + 1):
            for contestant in answering:
                reads = memory.step(n)["bytes_per_second"]
                contestant.step(n)["reads"] = reads
            rates = (f"{c.name} {c.answers[-1]['tokens_per_second']:.1f}" for c in answering)
            print(f"round {n} of {rounds}, tokens/s: {', '.join(rates)}", file=sys.stderr)
        report(job, answering)


def prepare(names: list[str], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The job, and the interpreter of each contestant."""
    import torch
    from peers import environment

    from lit_gpt import Config

    vocabulary = Config.from_checkpoint(checkpoint_dir).vocab_size
    shape, generator = (batch_size, prompt_tokens), torch.Generator().manual_seed(7)
    job = {
        "checkpoint_dir": str(checkpoint_dir.absolute()), "new_tokens": new_tokens,
        "prompts": torch.randint(vocabulary, shape, generator=generator).tolist(),
        "precision": precision, "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(), "gguf": {},
        "quantized": {f: quantized(folder / f, f) for f in FORMATS if any(n.endswith(f) for n in names)},
    }  # fmt: skip
    pythons = dict.fromkeys(names, sys.executable)
    for name in [name for name in names if name.startswith("llama")]:
        if peer_python and batch_size == 1:
            pythons[name] = peer_python
            job["gguf"][name] = gguf(folder, name.removeprefix("llama").removeprefix("_") or precision)
        else:
            del pythons[name]
            print(f"left out: {name}: it takes --peer_python and answers one prompt at a time", file=sys.stderr)
    if "litgpt" in pythons and (batch_size > 1 or not peers_dir):
        del pythons["litgpt"]
        why = "it answers one prompt at a time" if peers_dir else "--peers_dir names a folder to install it into"
        print(f"left out: litgpt: {why}", file=sys.stderr)
    if "litgpt" in pythons:
        pythons["litgpt"] = environment.litgpt_python(peers_dir, torch.__version__)
        where = folder / "litgpt_checkpoint"
        made = environment.litgpt_checkpoint(pythons["litgpt"], checkpoint_dir, where, litgpt_name)
        job["litgpt_dir"] = str(made)
    return job, pythons


def quantized(folder: Path, format: str) -> str:
    """The checkpoint in fewer bits, as scripts/quantize.py keeps it."""
    script = Path(__file__).parent.parent / "scripts" / "quantize.py"
    flags = ["--checkpoint_dir", checkpoint_dir, "--quantize", format, "--rounding", "nearest", "--out_dir", folder]
    subprocess.run([sys.executable, script, *flags], check=True, stdout=sys.stderr)
    return str(folder)


def gguf(folder: Path, dtype: str) -> str:
    """The checkpoint as llama.cpp reads it; q4_0 is made of bf16, for ours writes no 4 bits."""
    from peers.environment import run as run_command

    script, out = Path(__file__).parent.parent / "scripts" / "convert_lit_checkpoint.py", folder / f"gguf_{dtype}"
    stored = "bf16" if dtype == "q4_0" else dtype
    export = ["--checkpoint_dir", checkpoint_dir, "--format", "gguf", "--dtype", stored, "--out_dir", out]
    run_command(f"exporting {dtype}", [sys.executable, script, *export])
    (path,) = out.glob("*.gguf")
    if dtype == "q4_0":
        made = path.with_name("q4_0.gguf")
        run_command("quantizing", [sys.executable, Path(__file__).parent / "peers" / "gguf_q4_0.py", path, made])
        path = made
    return str(path)


def report(job: dict[str, Any], contestants: list) -> None:
    import torch
    from peers.isa import suffix
    from peers.report import command, machine

    by_name = {c.name: c for c in contestants}
    usual = by_name.get("hf") or by_name.get("llama") or contestants[0]
    contents = {
        "command": command("generate_speed"), "date": date.today().isoformat(), "torch": torch.__version__,
        "machine": machine(contestants[0].about["threads"]), "reference": usual.name,
        "reads_bytes_per_second": sorted(a["reads"] for c in contestants for a in c.answers[1:]),
        "contestants": {c.name: figures(c, by_name.get(PEERS.get(c.name, ""), usual)) for c in contestants},
    }  # fmt: skip
    several = f"_batch{batch_size}" if batch_size > 1 else ""
    stem = out_dir / f"generate_speed_{job['device']}{several}{suffix(isa)}"
    out_dir.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(contents, indent=2) + "\n")
    stem.with_suffix(".md").write_text(table(contents))
    print(table(contents))


def figures(c: Any, reference: Any) -> dict[str, Any]:
    """Medians of a contestant's answers, each held against the reference's in the same round and against what memory
    allowed just before."""
    answers, weights = c.answers[1:], c.about["weight_bytes"]
    rates = [a["tokens_per_second"] for a in answers]
    pairs = sorted(rate / r["tokens_per_second"] for rate, r in zip(rates, reference.answers[1:], strict=True))
    same = zip(answers[0]["ids"], reference.answers[1]["ids"], strict=False)  # llama.cpp gives text alone
    return {
        "reference": reference.name,
        "tokens_per_second": median(rates), "over_reference": median(pairs), "range": [pairs[0], pairs[-1]],
        "weight_bytes": weights,
        "of_bound": median(rate / batch_size * weights / a["reads"] for rate, a in zip(rates, answers, strict=True)),
        "first_seconds": median(a["first_seconds"] for a in answers),
        "prompt_tokens_per_second": median(batch_size * prompt_tokens / a["first_seconds"] for a in answers),
        "first_answer_seconds": c.answers[0]["first_seconds"]
        + batch_size * (new_tokens - 1) / c.answers[0]["tokens_per_second"],
        "peak_bytes": max(a["peak_bytes"] for a in answers), "same_tokens": sum(a == b for a, b in same),
    }  # fmt: skip


def table(r: dict[str, Any]) -> str:
    from peers.report import fill

    machine, reads = r["machine"], r["reads_bytes_per_second"]
    where = machine.get("gpu") or f"{machine['cores']} cores of {machine['cpu']} ({', '.join(machine['extensions'])})"
    rows = "\n".join(
        f"| {TITLES[name]} | {c['tokens_per_second']:.1f} | {c['over_reference']:.2f} x {TITLES[c['reference']]} "
        f"({c['range'][0]:.2f} to {c['range'][1]:.2f}) | {c['of_bound']:.0%} | {c['prompt_tokens_per_second']:.0f} "
        f"| {c['first_seconds']:.2f} s | {c['first_answer_seconds']:.1f} s | {c['peak_bytes'] / 1e9:.2f} GB "
        f"| {c['same_tokens']} |"
        for name, c in r["contestants"].items()
    )
    sizes = sorted({round(c["weight_bytes"] / 1e6) for c in r["contestants"].values()}, reverse=True)
    notes = (
        f"{precision}, {batch_size} prompts of {prompt_tokens} random tokens, {new_tokens} greedy tokens "
        f"each, medians of {rounds} rounds in which all take turns. Bound: the weights that a token of each prompt "
        f"needs ({', '.join(map(str, sizes))} MB), read at the speed that the machine shows just before each answer, "
        f"the best of eight sums of half a gigabyte: {reads[0] / 1e9:.0f} to {reads[-1] / 1e9:.0f} GB/s. The prompts' "
        "speed is their tokens over the time to the first new ones. The first answer of a process, which is not among "
        "the medians, includes compiling where something is compiled, with what is kept of it on disk. Same: how many "
        "of the answers' tokens are that peer's, in place (llama.cpp gives text alone); in bfloat16 a near tie ends "
        "the likeness."
    )
    head = "tokens/s | times a peer's (range) | of bound | prompt tokens/s | first token | first answer"
    return f"""# Generating at batch {batch_size}: {model or checkpoint_dir.name}

`{r["command"]}`

{where}, threads {machine["threads"]}, {machine["memory_gib"]} GiB; torch {r["torch"]}; {r["date"]}.

| | {head} | peak memory | same |
|---|---:|---:|---:|---:|---:|---:|---:|---:|
{rows}

{fill(notes)}
"""


if __name__ == "__main__":
    run(main)
