"""Decoding and training with one thread and with two, on a machine that is quiet and one where others compute.

    python benchmarks/busy_machine.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct

Others are loops that never end, for the seconds of the measurement. Both numbers of threads take turns in one process,
and with them llama.cpp with two threads, in a process of its own, where --peer_python has it. Writes busy_machine.json
and .md.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from lit_gpt.cli import PositiveInt, run
from lit_gpt.files import write_json

checkpoint_dir: Path = Path("checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct")  # Train and decode with this.
peer_python: Path | None = None  # Let llama.cpp of this interpreter decode too (null: leave it out).
gguf: Path | None = None  # Give it the checkpoint in this file.
out_dir: Path = Path("benchmarks/results")  # Write the results to this folder.
loops: PositiveInt = 2  # Let so many others compute.
samples: PositiveInt = 4  # Train on a packed row of so many samples of 256 tokens.
new_tokens: PositiveInt = 64  # Generate so many after a prompt of as many.
rounds: PositiveInt = 3  # Count so many turns of each; one before them does not count.


def main() -> None:
    import methods_speed
    import torch
    from peers.report import command, machine
    from peers.turns import take_turns

    from lit_gpt.checkpoints.base_model import BaseCheckpoint
    from lit_gpt.generation.engine import generate
    from lit_gpt.generation.steps import FastStep

    methods_speed.checkpoint_dir, methods_speed.samples, methods_speed.sample_tokens = checkpoint_dir, samples, 256
    train, _ = methods_speed.training("LoRA")
    model = BaseCheckpoint.open(checkpoint_dir).build(torch.bfloat16).eval()
    prompt, step, here = torch.randint(3, 1000, (new_tokens,)).tolist(), FastStep(model), machine(2)

    def decode() -> None:
        list(generate(model, prompt, new_tokens, temperature=0, step=step))

    def by(threads: int, work: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: (torch.set_num_threads(threads), work())

    found: dict[str, dict[str, float]] = {}
    for what, work, tokens in (("decoding", decode, new_tokens), ("training", train, 256 * samples)):
        contestants = {str(threads): by(threads, work) for threads in (1, 2)}
        with llama_cpp(prompt) if what == "decoding" and peer_python else nullcontext() as llama:
            contestants |= {"llama": llama} if llama else {}
            for state, others in (("quiet", 0), ("busy", loops)):
                with computing(others):
                    times = take_turns(f"{what}, {state}", contestants, rounds)
                found[f"{what}, {state}"] = figures(times, tokens)
    about = {"command": command("busy_machine"), "date": date.today().isoformat(), "torch": torch.__version__}
    out_dir.mkdir(parents=True, exist_ok=True)
    write_json(out_dir / "busy_machine.json", about | {"machine": here, "found": found})
    (out_dir / "busy_machine.md").write_text(page(about, here, found))


def figures(times: dict[str, list[float]], tokens: int) -> dict[str, float]:
    """Return each contestant's tokens a second, and how many times as fast as the others two threads are."""
    rates = {name: tokens / median(seconds) for name, seconds in times.items()}
    ratios = {
        f"2 over {name}": median(other / two for other, two in zip(seconds, times["2"], strict=True))
        for name, seconds in times.items()
        if name != "2"
    }
    return rates | ratios


@contextmanager
def llama_cpp(prompt: list[int]) -> Iterator[Callable[[], Any]]:
    """Start llama.cpp with two threads; yields what lets it answer the prompt once."""
    from peers.process import Contestant

    job = {"gguf": {"llama": str(gguf)}, "prompts": [prompt], "new_tokens": new_tokens, "threads": 2}
    with tempfile.TemporaryDirectory() as folder:
        contestant = Contestant("llama", job, Path(folder), str(peer_python), script="llama.py")
        try:
            contestant.ready()
            yield lambda: contestant.step(0)
        finally:
            contestant.stop()


@contextmanager
def computing(others: int) -> Iterator[None]:
    """Let other processes compute meanwhile."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def page(about: dict[str, str], here: dict[str, Any], found: dict[str, dict[str, float]]) -> str:
    where = f"{here['cores']} cores of {here['cpu']}, torch {about['torch']}, {about['date']}"
    head = (
        "| | 1 thread, tokens/s | 2 threads, tokens/s | 2 over 1 | llama.cpp, 2 threads | 2 over its |\n"
        "|---|---:|---:|---:|---:|---:|\n"
    )
    rows = (
        f"| {name} | {r['1']:.0f} | {r['2']:.0f} | {r['2 over 1']:.2f} "
        + (f"| {r['llama']:.0f} | {r['2 over llama']:.2f} |\n" if "llama" in r else "| | |\n")
        for name, r in found.items()
    )
    words = f"Busy: {loops} processes compute beside. Medians of {rounds} turns; ratios are medians of those of a turn."
    return f"# A machine where others compute\n\n`{about['command']}` on {where}.\n\n{head}{''.join(rows)}\n{words}\n"


if __name__ == "__main__":
    run(main)
