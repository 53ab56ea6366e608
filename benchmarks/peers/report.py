"""The race's results as JSON, a table and a picture."""

import json
import os
import platform
import re
import shlex
import sys
import textwrap
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peers.isa import suffix as isa_suffix

from lit_gpt.files import atomic

TITLES = {"ours": "Lit-GPT", "peft": "PEFT", "peft_tuned": "PEFT, tuned", "litgpt": "LitGPT"}
COLORS = {"ours": "tab:blue", "peft": "tab:orange", "peft_tuned": "tab:green", "litgpt": "tab:red"}
fill = partial(textwrap.fill, width=120, break_long_words=False, break_on_hyphens=False)
COMPARED = 3  # first steps whose losses are compared: all contestants start from the same adapters


class Results:
    """Everything that is reported, in `contents`.

    Args:
        flags: the command line's.
        work: a train_speed.Work.
        running: the contestants with their answers, the matrix products first.
        startups: seconds to the first step, of each start.
        idle: per round, which share of a core the waiting contestants used.
        left_out: who did not take part, and why.
    """

    def __init__(
        self, flags: dict, work: Any, running: list, startups: dict, idle: list[float], left_out: dict[str, str]
    ) -> None:
        gemm, *contestants = running
        measured = slice(flags["warmup"], None)
        rates = [answer["loss"] for answer in gemm.answers[measured]]  # FLOP/s
        ours = next(c for c in contestants if c.name == "ours")
        flops = [sum(parts.values()) for parts in work.parts]
        fed = [sum(lengths) for lengths in work.lengths]
        per_token = {name: sum(p[name] for p in work.parts) / sum(fed) for name in work.parts[0]}
        self.contents: dict[str, Any] = {
            "command": command(),
            "date": date.today().isoformat(),
            "machine": machine(ours.about["threads"]),
            "versions": versions(contestants),
            "settings": {k: str(v) if isinstance(v, Path) else v for k, v in flags.items() if not is_place(k)},
            "model": flags["model"] or work.config.name,
            "tokens_per_step": median(fed[measured]),
            "supervised_per_step": median(work.supervised[measured]),
            "flops_per_token": per_token,
            "gemm_flops_per_second": median(rates),
            "ceiling_tokens_per_second": median(r * n / f for r, n, f in zip(rates, fed[measured], flops[measured],
                                                                             strict=True)),
            "idle_share_of_a_core": median(idle[measured]),
            "left_out": left_out,
            "contestants": {
                c.name: contestant(c, ours, measured, startups[c.name], rates, flops[measured]) for c in contestants
            },
        }  # fmt: skip
        for c in contestants:
            if [answer["tokens"] for answer in c.answers] != fed:
                raise AssertionError(f"{c.name} fed other tokens than it was given")

    def write(self, out_dir: Path) -> None:
        device = "cuda" if "gpu" in self.contents["machine"] else "cpu"
        stem = f"train_speed_{device}{isa_suffix(self.contents['settings']['isa'])}"
        for suffix, write in (("json", self.json), ("md", self.markdown), ("png", self.plot)):
            with atomic(out_dir / f"{stem}.{suffix}") as temporary:
                write(temporary, stem)
        print(f"{(out_dir / f'{stem}.md').read_text(encoding='utf-8')}\nwrote {out_dir / stem}.json, .md and .png")

    def json(self, path: Path, _: str) -> None:
        path.write_text(json.dumps(self.contents, indent=2) + "\n", encoding="utf-8")

    def markdown(self, path: Path, stem: str) -> None:
        path.write_text(table(self.contents, stem), encoding="utf-8")

    def plot(self, path: Path, _: str) -> None:
        draw(self.contents, path)


def contestant(c: Any, ours: Any, measured: slice, startup: list, rates: list, flops: list) -> dict[str, Any]:
    """One contestant's figures. Ratios are medians over rounds, each of two steps of the same samples in one round."""
    answers, reference = c.answers[measured], ours.answers[measured]
    pairs = sorted(a["seconds"] / o["seconds"] for a, o in zip(answers, reference, strict=True))
    peak = max(answer["peak_bytes"] for answer in c.answers)
    apart = [abs(a["loss"] - o["loss"]) for a, o in zip(c.answers[:COMPARED], ours.answers, strict=False)]
    return {
        "title": TITLES[c.name],
        "tokens_per_second": median(a["tokens"] / a["seconds"] for a in answers),
        "time_over_ours": median(pairs),
        "time_over_ours_range": [pairs[0], pairs[-1]],
        "share_of_ceiling": median(f / r / a["seconds"] for f, r, a in zip(flops, rates, answers, strict=True)),
        "peak_bytes": max(peak, c.about["loading_peak_bytes"]),
        "training_peak_bytes": peak,
        "peak_over_model_bytes": peak - c.about["model_bytes"],
        "start_seconds": startup,
        "trainable_parameters": c.about["trainable_parameters"],
        "losses": [answer["loss"] for answer in c.answers],
        "first_losses_from_ours": max(apart),
        "seconds": [answer["seconds"] for answer in c.answers],
        "tokens": [answer["tokens"] for answer in c.answers],
    }


def is_place(flag: str) -> bool:
    return flag.endswith("_dir")


def command(name: str = "train_speed") -> str:
    """The command line, without where things lie on this machine."""
    parts = [re.sub(r"^(--\w+=)?/.*/", r"\1", part) for part in sys.argv[1:]]
    return f"python benchmarks/{name}.py " + shlex.join(parts)


def machine(threads: int) -> dict[str, Any]:
    info = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        info.setdefault(name.strip(), value.strip())
    flags, memory = info.get("flags", "").split(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    known = ("avx2",) if os.environ.get("LIT_GPT_MARCH") else ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    extensions = [name for name in known if name in flags]
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "cpu": info.get("model name") or platform.machine(),
        "extensions": extensions,
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "memory_gib": round(memory / 2**30),
        **gpu,
    }


def versions(contestants: list) -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for c in contestants:
        found |= {name: c.about[name] for name in ("transformers", "peft", "litgpt") if name in c.about}
        if c.about["torch"] != torch.__version__:
            found[f"torch of {c.name}"] = c.about["torch"]
    return found


def notes(s: dict[str, Any]) -> dict[str, str]:
    """What each contestant is, by the settings."""
    rows = f"up to {s['row_tokens']} tokens" if s["row_tokens"] else "as many tokens as it chooses"
    attention = "torch.compile" if s["tuned_compile"] else "our attention lent to it where it takes one, else a mask"
    return {
        "ours": f"`finetune/lora.py` itself, packed rows of {rows}; what it writes while it goes is in its "
        "times, its dry run on the longest row and its first validation in its start",
        "peft": f"a plain loop as in its documentation; float32 adapters, padded micro-batches of {s['micro_batch']}",
        "peft_tuned": f"bfloat16 adapters, packed rows of {s['tuned_row']} samples, head at supervised positions, "
        + attention,
        "litgpt": f"its own `fit`, weights and adapters in {s['precision']}, micro-batches of {s['litgpt_micro_batch']}"
        " (its default is 1), of whose mean losses it takes the mean; the loss shown is over all supervised tokens",
    }


def table_row(c: dict[str, Any]) -> str:
    low, high = c["time_over_ours_range"]
    cells = [
        c["title"],
        f"{c['tokens_per_second']:.0f}",
        f"{c['time_over_ours']:.2f} ({low:.2f} to {high:.2f})",
        f"{c['share_of_ceiling']:.0%}",
        f"{c['peak_bytes'] / 1e9:.2f} GB",
        f"{c['peak_over_model_bytes'] / 1e9:.2f} GB",
        f"{min(c['start_seconds']):.1f} s" if c["start_seconds"] else "not measured",
        f"{c['losses'][-1]:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


HEADING = [
    "| | tokens/s | time, ours = 1 (range) | of the ceiling | peak memory | over the model | start | loss, last step |",
    "|---|---:|---:|---:|---:|---:|---:|---:|",
]


def table(r: dict[str, Any], stem: str) -> str:
    s, found = r["settings"], r["contestants"]
    paragraphs = [
        f"# Speed and memory of LoRA finetuning: {r['model']}",
        f"`{r['command']}`",
        fill(where(r)),
        "\n".join([*HEADING, *(table_row(c) for c in found.values())]),
        *(fill(f"Left out: {TITLES[name]} ({reason}).") for name, reason in r["left_out"].items()),
        *map(fill, how(r, s)),
        "\n".join(fill(f"- {c['title']}: {notes(s)[name]}.", subsequent_indent="  ") for name, c in found.items()),
        f"![{stem}]({stem}.png)",
    ]
    return "\n\n".join(paragraphs) + "\n"


def where(r: dict[str, Any]) -> str:
    m = r["machine"]
    device = f"{m['gpu']}; " if "gpu" in m else ""
    found = "; ".join(f"{name} {version}" for name, version in r["versions"].items())
    cpu = f"{m['cores']} cores of {m['cpu']} ({', '.join(m['extensions'])})"
    return f"{device}{cpu}, threads of each process {m['threads']}, {m['memory_gib']} GiB; {found}; {r['date']}."


def how(r: dict[str, Any], s: dict[str, Any]) -> list[str]:
    """What was measured, and how; in paragraphs."""
    layers = "all linear layers" if s["lora_layers"] == "all" else "queries and values"
    parts = "; ".join(f"{name} {n / 1e6:.1f}" for name, n in r["flops_per_token"].items())
    apart = ", ".join(
        f"{c['title']} {c['first_losses_from_ours']:.4f}" for name, c in r["contestants"].items() if name != "ours"
    )
    precision = s["precision"] + (f" (PEFT: {s['peers_precision']})" if s["peers_precision"] else "")
    return [
        f"{precision}, r {s['lora_r']} on {layers} of the blocks, dropout {s['lora_dropout']}, AdamW, batch "
        f"{s['batch_size']}. {s['steps']} rounds after {s['warmup']} that do not count; in each, every contestant "
        f"takes a step of the same samples, one after the other. A step has {r['tokens_per_step']:.0f} tokens, "
        f"{r['supervised_per_step']:.0f} of them supervised (medians). Tokens are those that predict another, never "
        "padding. The time is the median over rounds of the ratio of the two steps in a round. Peak memory is of the "
        "whole process, over the model what training adds. The start is from launching the process, alone on the "
        "machine and on a CPU our kernels not yet compiled, to its first finished step, the quickest of "
        f"{s['starts']}. Those who waited used "
        f"{r['idle_share_of_a_core']:.1%} of one core.",
        f"The ceiling, {r['ceiling_tokens_per_second']:.0f} tokens/s, is what the step's matrix products alone would "
        f"allow at {r['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s, the rate of the frozen layers' products measured in "
        f"the same rounds. MFLOP per token: {parts}.",
        f"Greatest distance of the first {COMPARED} losses from ours: {apart or 'nobody to compare with'}.",
    ]


def draw(r: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = r["contestants"]
    titles, colors = [c["title"] for c in found.values()], [COLORS[name] for name in found]
    figure, (speed, memory, loss) = pyplot.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    bars = speed.bar(titles, [c["tokens_per_second"] for c in found.values()], color=colors)
    speed.bar_label(bars, fmt="%.0f")
    ceiling = r["ceiling_tokens_per_second"]
    speed.axhline(ceiling, color="gray", linestyle="--", label=f"matrix products alone: {ceiling:.0f}")
    speed.set(title="Speed", ylabel="real tokens per second")
    speed.margins(y=0.2)
    speed.legend(loc="upper right")
    over = [c["peak_over_model_bytes"] / 1e9 for c in found.values()]
    rest = [c["training_peak_bytes"] / 1e9 - o for c, o in zip(found.values(), over, strict=True)]
    memory.bar(titles, rest, color=colors, alpha=0.4)
    bars = memory.bar(titles, over, bottom=rest, color=colors)
    memory.bar_label(bars, labels=[f"{a + b:.2f}" for a, b in zip(rest, over, strict=True)])
    memory.set(title="Peak memory in training (pale: process and model)", ylabel="GB")
    memory.margins(y=0.1)
    for name, c in found.items():
        loss.plot(range(1, len(c["losses"]) + 1), c["losses"], color=COLORS[name], label=c["title"], marker=".")
    loss.set(title="Loss of each step, the same samples for all", xlabel="optimizer step", ylabel="nats per token")
    loss.xaxis.get_major_locator().set_params(integer=True)
    loss.grid(alpha=0.3)
    loss.legend()
    figure.savefig(path, format="png", dpi=110)
    pyplot.close(figure)
