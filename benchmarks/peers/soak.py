"""Clients of all manners at once, for long: those who ask well must be answered right, whatever the others do."""

import http.client
import json
import random
import shutil
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from peers.served import HEADERS, ServerProcess, make_loras, our_server

TEXTS = ("The capital of France is", "Once upon a time", "def add(a, b):", "Two and two make", "In the year 1969 ")
NEW, LORAS, SWAPPED = 24, 8, "swapped"
CHAT = "/v1/chat/completions"


class Soak:
    """Runs the clients.

    Attributes:
        expected: what each model gives alone to each text.
        counts: of what the clients saw, by kind.
        resident: bytes, by the seconds since the start.
    """

    def __init__(self, server: ServerProcess, folder: Path, expected: dict[tuple[str, str], str]) -> None:
        self.server, self.folder, self.expected = server, folder, expected
        self.models = sorted({model for model, _ in expected})
        self.loras = [model for model in self.models if model.startswith("lora")]
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.resident: list[tuple[float, int]] = []
        self.lock, self.end = threading.Lock(), 0.0

    def run(self, minutes: float) -> None:
        start, self.end = time.monotonic(), time.monotonic() + 60 * minutes
        kinds = [self.well, self.well, self.well, self.swapped, self.replace, *[self.badly] * 2]
        threads = [threading.Thread(target=self.repeat, args=(kind, i), daemon=True) for i, kind in enumerate(kinds)]
        for thread in threads:
            thread.start()
        while time.monotonic() < self.end and self.server.alive:
            self.resident.append((time.monotonic() - start, self.server.memory()))
            time.sleep(5)
        self.end = 0.0
        for thread in threads:
            thread.join(timeout=120)

    def repeat(self, act: Callable[[random.Random], str], seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < self.end and self.server.alive:
            try:
                told = act(draw)
            except (OSError, http.client.HTTPException) as error:
                told = f"{act.__name__}: {type(error).__name__}"
            with self.lock:
                self.counts[told] += 1

    # who ask well

    def well(self, draw: random.Random) -> str:
        model, text = draw.choice(self.models), draw.choice(TEXTS)
        found = self.server.ask(self.body(model, text))
        if found.status == 200 and found.text != self.expected[model, text]:
            self.wrong.append(f"{model}, {text!r}: {found.text!r}")
            return "well-formed: wrong"
        return "well-formed: right" if found.status == 200 else f"well-formed: status {found.status}"

    def swapped(self, draw: random.Random) -> str:
        """Ask for the LoRA whose file is replaced: either content is right, and that it cannot be used."""
        time.sleep(draw.uniform(0, 0.5))
        text = draw.choice(TEXTS)
        found = self.server.ask(self.body(SWAPPED, text))
        allowed = {self.expected[model, text] for model in self.loras[:2]}
        if found.status == 200 and found.text not in allowed:
            self.wrong.append(f"{SWAPPED}, {text!r}: {found.text!r}")
            return "replaced file: wrong"
        return "replaced file: right" if found.status == 200 else f"replaced file: status {found.status}"

    def body(self, model: str, text: str) -> dict[str, Any]:
        return {"model": model, "prompt": text, "max_tokens": NEW, "temperature": 0}

    # who do not

    def replace(self, draw: random.Random) -> str:
        """Replace a served file by another LoRA, by garbage, by half of itself, or remove it."""
        time.sleep(draw.uniform(0.5, 3))
        target, source = self.folder / f"{SWAPPED}.pth", self.folder / f"{draw.choice(self.loras[:2])}.pth"
        how = draw.choice(("renamed over", "renamed over", "copied over", "cut", "garbage", "removed"))
        if how == "renamed over":
            shutil.copy(source, target.with_name(".new"))
            target.with_name(".new").replace(target)
        elif how == "copied over":
            shutil.copy(source, target)
        elif how == "cut":
            target.write_bytes(source.read_bytes()[: draw.randrange(10**6)])
        elif how == "garbage":
            target.write_bytes(draw.randbytes(10**5))
        else:
            target.unlink(missing_ok=True)
        return f"file: {how}"

    def badly(self, draw: random.Random) -> str:
        time.sleep(draw.uniform(0, 0.3))
        return draw.choice((self.vanishing, self.slow, self.garbage, self.garbage, self.large, self.cut))(draw)

    def raw(self, body: bytes, promised: int | None = None) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.server.port), timeout=60)
        length = len(body) if promised is None else promised
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        connection.sendall(head.encode() + body)
        return connection

    def chat(self, draw: random.Random, **change: Any) -> bytes:
        messages = [{"role": "user", "content": draw.choice(TEXTS)}]
        return json.dumps({"model": draw.choice(self.models), "messages": messages, "stream": True} | change).encode()

    def vanishing(self, draw: random.Random) -> str:
        with self.raw(self.chat(draw, max_tokens=200, n=draw.randint(1, 3))) as connection:
            time.sleep(draw.uniform(0, 1))
            with suppress(OSError):
                connection.recv(100)
        return "vanished"

    def slow(self, draw: random.Random) -> str:
        with self.raw(self.chat(draw, max_tokens=100)) as connection:
            for _ in range(20):
                if not connection.recv(20):
                    break
                time.sleep(0.1)
        return "slow reader"

    def cut(self, draw: random.Random) -> str:
        body = self.chat(draw)
        with self.raw(body[: draw.randrange(len(body))], len(body)):
            pass
        return "cut body"

    def large(self, draw: random.Random) -> str:
        return self.refused("10 MB", self.chat(draw, messages=[{"role": "user", "content": "x" * 10**7}]))

    def garbage(self, draw: random.Random) -> str:
        kind, body = draw.choice((
            ("garbage JSON", draw.randbytes(300)), ("garbage JSON", b'{"model": [' * draw.randint(1, 5000)),
            ("invalid UTF-8", self.chat(draw).replace(b"user", b"us\xff\xfe")),
            ("negative numbers", self.chat(draw, max_tokens=-5)), ("negative numbers", self.chat(draw, n=-1)),
            ("negative numbers", self.chat(draw, temperature=-0.5)), ("huge numbers", self.chat(draw, n=10**30)),
            ("unknown adapter", self.chat(draw, model=f"nobody{draw.random()}")),
            ("beyond the context", self.chat(draw, messages=[{"role": "user", "content": "word " * 5000}])),
        ))  # fmt: skip
        return self.refused(kind, body)

    def refused(self, kind: str, body: bytes) -> str:
        connection = self.server.connect()
        try:
            connection.request("POST", CHAT, body, HEADERS)
            status = connection.getresponse().status
        finally:
            connection.close()
        return f"{kind}: {'refused' if 400 <= status < 500 else f'status {status}'}"

    def report(self, exit_code: int) -> dict[str, Any]:
        end = self.resident[-1][0]
        second = [size for when, size in self.resident if when > end / 2]
        quarters = second[: len(second) // 2], second[len(second) // 2 :]
        return {
            "seconds": end, "counts": dict(sorted(self.counts.items())), "wrong": self.wrong[:10],
            "exit_code_after_sigterm": exit_code,
            "resident_bytes": {
                "start": self.resident[0][1], "half": second[0], "end": second[-1],
                "third_quarter": median(quarters[0]), "fourth_quarter": median(quarters[1]),
                "growth_over_second_half": median(quarters[1]) / median(quarters[0]) - 1,
                "spread_over_second_half": max(second) / min(second) - 1,
            },
        }  # fmt: skip


def answers_alone(checkpoint_dir: Path, folder: Path, names: list[str]) -> dict[tuple[str, str], str]:
    """What each model gives to each text by the library alone, in fp32, greedily."""
    from lit_gpt.checkpoints.base_model import BaseCheckpoint
    from lit_gpt.generation.engine import generate
    from lit_gpt.hardware import DTYPES
    from lit_gpt.methods.finetuned_model import build_finetuned

    base = BaseCheckpoint.open(checkpoint_dir)
    tokenizer, style, expected = base.tokenizer, base.prompt_style, {}
    for name in (checkpoint_dir.resolve().name, *names):
        path, dtype = folder / f"{name}.pth", DTYPES["fp32"]
        model = build_finetuned(base, path, "lora", dtype)[0] if name in names else base.build(dtype)
        for text in TEXTS:
            ids = tokenizer.encode(text).tolist()
            found = list(generate(model, ids, NEW, temperature=0, stop_ids=style.stop_ids))
            expected[name, text] = tokenizer.decode(found)
    return expected


def soak(checkpoint_dir: Path, folder: Path, minutes: float) -> dict[str, Any]:
    """Serve a checkpoint with eight LoRAs and room for four, and return what came of it."""
    loras = folder / "loras"
    names = make_loras(checkpoint_dir, loras, LORAS)
    print("answers alone", file=sys.stderr)
    expected = answers_alone(checkpoint_dir, loras, names)
    shutil.copy(loras / f"{names[0]}.pth", loras / f"{SWAPPED}.pth")
    # in fp32 one takes 2.9 MB: of four rows each and one more
    flags = {"loras_dir": loras, "precision": "fp32", "batch_size": 4, "context": 512, "lora_bytes": 5 * 3_000_000}
    server = our_server(checkpoint_dir, folder / "server.log", **flags)
    try:
        running = Soak(server, loras, expected)
        running.run(minutes)
    finally:
        code = server.stop()
    return running.report(code)
