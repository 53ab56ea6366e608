"""The server under load: many LoRAs against one, beside llama.cpp's server, and for a long time among bad clients.

    python benchmarks/serve_load.py --mode loras --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct
    python benchmarks/serve_load.py --mode peers --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct \\
        --peer_python out/peers/xllamacpp/bin/python
    python benchmarks/serve_load.py --mode soak --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct \\
        --minutes 30

loras: requests are drawn by Zipf from --loras files; one server has room for all of them, another for --room; who asks
takes turns between them and one LoRA alone. peers: the same weights behind both servers, which take turns. Both are
told their tokens by the servers' own counts. Writes serve_MODE.json and .md.
"""

import json
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, Literal

from lit_gpt.cli import PositiveFloat, PositiveInt, run
from lit_gpt.errors import UsageError

checkpoint_dir: Path = Path("checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct")  # converted folder
mode: Literal["loras", "peers", "soak"] = "loras"  # what is measured
loras: PositiveInt = 1000  # how many there are
room: PositiveInt = 100  # how many of them the second server's pool holds
concurrent: PositiveInt = 8  # requests at a time, of mode loras
requests: PositiveInt = 64  # of each round
rounds: PositiveInt = 5  # in which all take turns
prompt_tokens: PositiveInt = 64  # of each request
new_tokens: PositiveInt = 128  # of each request
minutes: PositiveFloat = 30.0  # of mode soak
peer_python: Path | None = None  # interpreter that has xllamacpp
out_dir: Path = Path("benchmarks/results")  # folder for the results

PROMPT_IDS = 40_000  # below which ids are drawn
ZIPF = 1.0  # exponent
ROWS = 32  # of mode peers


def main() -> None:
    if mode == "peers" and peer_python is None:
        raise UsageError("--peer_python: expected an interpreter with xllamacpp: pip install xllamacpp in a venv")
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        if mode == "soak":
            from peers.soak import soak

            return report(soak(checkpoint_dir, folder, minutes))
        return report(many_loras(folder, stack) if mode == "loras" else beside_llama(folder, stack))


def body(draw: random.Random, model: str) -> dict[str, Any]:
    ids = [draw.randrange(1000, PROMPT_IDS) for _ in range(prompt_tokens)]
    # llama.cpp goes on beyond the end of text if it is told to; ours knows no such field, and seldom draws that token
    return {"model": model, "prompt": ids, "max_tokens": new_tokens, "temperature": 0}


def load(server: Any, bodies: list[dict[str, Any]], at_once: int) -> dict[str, Any]:
    """Ask so many at a time, and return what came of it."""
    start = time.perf_counter()
    with ThreadPoolExecutor(at_once) as clients:
        answers = list(clients.map(server.ask, bodies))
    seconds = time.perf_counter() - start
    return {
        "tokens_per_second": sum(answer.tokens for answer in answers) / seconds,
        "first_seconds": median(answer.first for answer in answers),
        "failed": sum(answer.status != 200 for answer in answers), "resident_bytes": server.memory(),
    }  # fmt: skip


def many_loras(folder: Path, stack: ExitStack) -> dict[str, Any]:
    from peers.served import make_loras, our_server

    print(f"making {loras} LoRAs", file=sys.stderr)
    names = make_loras(checkpoint_dir, folder / "loras", loras)
    one = one_bytes(folder / "loras" / f"{names[0]}.pth")
    flags = {"loras_dir": folder / "loras", "batch_size": concurrent, "context": prompt_tokens + new_tokens}
    flags |= {"prefixes": 0, "max_queue": 1000}
    servers = {}
    for name, n in (("all", loras + 1), ("room", room)):
        servers[name] = our_server(
            checkpoint_dir, folder / f"{name}.log", lora_bytes=max(n, concurrent + 1) * one, **flags
        )
        stack.callback(servers[name].stop)
    draw, weights = random.Random(7), [1 / rank**ZIPF for rank in range(1, loras + 1)]
    drawn = [draw.choices(names, weights, k=requests) for _ in range(rounds)]
    for server in servers.values():  # each file is compared with the base when it is first read
        print("first reads", file=sys.stderr)
        short = [body(draw, name) | {"max_tokens": 1} for name in dict.fromkeys(sum(drawn, []))]
        load(server, short, concurrent)
    turns = {"one": ("all", lambda n: [names[0]] * requests), "all": ("all", drawn.__getitem__)}
    turns["room"] = ("room", drawn.__getitem__)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in turns}
    for n in range(rounds):
        bodies = [body(draw, "") for _ in range(requests)]
        for name, (server, models) in turns.items():
            asked = [one | {"model": model} for one, model in zip(bodies, models(n), strict=True)]
            found[name].append(load(servers[server], asked, concurrent))
            print(f"round {n}, {name}: {found[name][-1]['tokens_per_second']:.1f} tokens/s", file=sys.stderr)
    peaks = {name: server.memory("VmHWM") for name, server in servers.items()}
    distinct = len(set(sum(drawn, [])))
    return {"lora_bytes": one, "distinct": distinct, "peak_bytes": peaks} | figures(found, "one")


def one_bytes(path: Path) -> int:
    """What a LoRA takes in the pool."""
    from lit_gpt.checkpoints.base_model import BaseCheckpoint
    from lit_gpt.hardware import DTYPES
    from lit_gpt.methods.multi_lora import LoRAPool

    base = BaseCheckpoint.open(checkpoint_dir)
    return LoRAPool(base.build(DTYPES["bf16"]), base, base.prompt_style).read(path).nbytes


def beside_llama(folder: Path, stack: ExitStack) -> dict[str, Any]:
    import torch
    from peers.environment import run as run_command
    from peers.served import ROOT, ServerProcess, our_server

    context, here, servers = prompt_tokens + new_tokens, Path(__file__).parent / "peers", {}
    flags = {"batch_size": ROWS, "context": context, "prefixes": 0, "max_queue": 1000}
    for kind, quantized in (("bf16", {}), ("8 bits", {"quantize": "int8"})):
        servers[f"ours {kind}"] = our_server(checkpoint_dir, folder / "ours.log", **flags, **quantized)
        dtype = "q8_0" if quantized else "bf16"
        script, out = ROOT / "scripts" / "convert_lit_checkpoint.py", folder / dtype
        export = ["--checkpoint_dir", checkpoint_dir, "--format", "gguf", "--dtype", dtype, "--out_dir", out]
        run_command(f"exporting {dtype}", [sys.executable, script, *export])
        (path,) = out.glob("*.gguf")
        argv = [peer_python, here / "llama_server.py", path, ROWS, context + 16, torch.get_num_threads()]
        servers[f"llama.cpp {kind}"] = ServerProcess(argv, folder / f"{dtype}.log")
    for server in servers.values():
        stack.callback(server.stop)
    draw, name, results = random.Random(7), checkpoint_dir.resolve().name, {}
    for at_once in (1, 8, 32):
        found: dict[str, list[dict[str, Any]]] = {server: [] for server in servers}
        for n in range(rounds + 1):  # the first does not count
            bodies = [body(draw, name) for _ in range(max(at_once, requests if n and at_once > 1 else at_once))]
            for server, answers in found.items():
                more = {"ignore_eos": True, "cache_prompt": False} if server.startswith("llama") else {}
                answers.append(load(servers[server], [one | more for one in bodies], at_once))
        results[at_once] = {
            kind: figures({x: found[f"{x} {kind}"][1:] for x in ("llama.cpp", "ours")}, "llama.cpp")["contestants"]
            for kind in ("bf16", "8 bits")
        }
        print(json.dumps(results[at_once]), file=sys.stderr)
    return {"at_once": results, "peak_bytes": {name: server.memory("VmHWM") for name, server in servers.items()}}


def figures(found: dict[str, list[dict[str, Any]]], reference: str) -> dict[str, Any]:
    """Medians over the rounds, and of the ratios to the reference in the same round."""
    rates = {name: [answer["tokens_per_second"] for answer in answers] for name, answers in found.items()}
    contestants = {}
    for name, answers in found.items():
        ratios = sorted(rate / other for rate, other in zip(rates[name], rates[reference], strict=True))
        contestants[name] = {
            "tokens_per_second": median(rates[name]), "over_reference": median(ratios),
            "range": [ratios[0], ratios[-1]], "failed": sum(answer["failed"] for answer in answers),
            "first_seconds": median(answer["first_seconds"] for answer in answers),
            "resident_bytes": answers[-1]["resident_bytes"],
        }  # fmt: skip
    return {"contestants": contestants}


def report(found: dict[str, Any]) -> None:
    import torch
    from peers.report import command, machine

    contents = {
        "command": command("serve_load"), "date": date.today().isoformat(), "torch": torch.__version__,
        "machine": machine(torch.get_num_threads()), **found,
    }  # fmt: skip
    stem = out_dir / f"serve_{mode}"
    out_dir.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(contents, indent=2) + "\n")
    stem.with_suffix(".md").write_text(page(contents))
    print(page(contents))


def page(r: dict[str, Any]) -> str:
    cpu = r["machine"]
    lines = {"loras": loras_lines, "peers": peers_lines, "soak": soak_lines}[mode](r)
    where = f"{cpu['cores']} cores of {cpu['cpu']}, threads {cpu['threads']}; torch {r['torch']}; {r['date']}."
    return "\n".join(["# The server under load: " + mode, "", f"`{r['command']}`", "", where, "", *lines, ""])


HEAD = "tokens/s | ratio (range) | first token | resident | failed |"


def row(name: str, c: dict[str, Any]) -> str:
    ratios = f"{c['over_reference']:.2f} ({c['range'][0]:.2f} to {c['range'][1]:.2f})"
    times = f"{c['first_seconds']:.2f} s | {c['resident_bytes'] / 1e9:.2f} GB | {c['failed']}"
    return f"| {name} | {c['tokens_per_second']:.1f} | {ratios} | {times} |"


def loras_lines(r: dict[str, Any]) -> list[str]:
    titles = {"one": "one LoRA", "all": f"{loras} LoRAs", "room": f"{loras} LoRAs, room for {room}"}
    peaks = ", ".join(f"{titles[name]} {size / 1e9:.2f} GB" for name, size in r["peak_bytes"].items())
    return [
        f"| | {HEAD}", "|---|---:|---:|---:|---:|---:|", *(row(titles[n], c) for n, c in r["contestants"].items()), "",
        f"{concurrent} requests of {prompt_tokens} + {new_tokens} tokens at a time, {requests} in each of {rounds} "
        f"rounds; {r['distinct']} LoRAs were drawn, each of {r['lora_bytes'] / 1e6:.2f} MB in memory. "
        f"Most held: {peaks}.",
    ]  # fmt: skip


def peers_lines(r: dict[str, Any]) -> list[str]:
    rows = [
        row(f"{name}, {kind}, {at_once} at once", c)
        for at_once, kinds in r["at_once"].items()
        for kind, contestants in kinds.items()
        for name, c in contestants.items()
    ]
    peaks = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in r["peak_bytes"].items())
    told = f"Requests of {prompt_tokens} + {new_tokens} tokens. Most held: {peaks}."
    return [f"| | {HEAD}", "|---|---:|---:|---:|---:|---:|", *rows, "", told]


def soak_lines(r: dict[str, Any]) -> list[str]:
    size, rows = r["resident_bytes"], [f"| {name} | {n} |" for name, n in r["counts"].items()]
    return [
        f"{r['seconds'] / 60:.1f} minutes, exit code {r['exit_code_after_sigterm']} after SIGTERM, {len(r['wrong'])} "
        f"wrong answers. Resident: {size['start'] / 1e6:.0f} MB at the start, {size['half'] / 1e6:.0f} MB at half "
        f"time, {size['end'] / 1e6:.0f} MB at the end; the fourth quarter over the third "
        f"{size['growth_over_second_half']:+.1%}, most over least in the second half "
        f"{size['spread_over_second_half']:+.1%}.", "", "| what clients saw | times |", "|---|---:|", *rows,
    ]  # fmt: skip


if __name__ == "__main__":
    run(main)
