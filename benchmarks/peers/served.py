"""A server as a process of its own, LoRAs for it, and a client that asks it."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from lit_gpt.errors import UserError

ROOT = Path(__file__).parent.parent.parent
HEADERS = {"Content-Type": "application/json"}


class Answered(NamedTuple):
    """What came of a request: HTTP status, text, tokens, seconds to the first text and to the end."""

    status: int
    text: str = ""
    tokens: int = 0
    first: float = 0.0
    seconds: float = 0.0


class ServerProcess:
    """A server that listens.

    Args:
        argv: starts it; it tells its address on stderr or stdout, behind "http://".

    Raises:
        UserError: it ended before it listened.
    """

    def __init__(self, argv: list, log: Path) -> None:
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            list(map(str, argv)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=env
        )
        self.port, said = 0, []
        for line in self.process.stdout:
            said.append(line)
            if line.startswith("serving ") and "http://" in line:
                self.port = int(line.partition("http://")[2].partition(":")[2].partition(";")[0].strip().rstrip("/"))
                break
        if not self.port:
            raise UserError(f"{argv[1]}: ended before it listened: {said[-1].strip() if said else 'no output'}")
        self.log = log
        threading.Thread(target=self._keep, args=(said,), daemon=True).start()

    def _keep(self, said: list[str]) -> None:
        with open(self.log, "w") as file:
            file.writelines(said)
            for line in self.process.stdout:
                file.write(line)
                file.flush()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def memory(self, field: str = "VmRSS") -> int:
        """A field of proc(5)'s status, in bytes: what is resident now, VmHWM the most so far."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024

    def stop(self) -> int:
        """End it by SIGTERM, and return its exit code."""
        if self.alive:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def connect(self, timeout: float = 300) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def ask(self, body: dict[str, Any], path: str = "/v1/completions") -> Answered:
        """Ask for a stream, and read it to its end."""
        start = time.perf_counter()
        text, first, usage = [], 0.0, {}
        with closing(self.connect()) as connection:
            asked = body | {"stream": True, "stream_options": {"include_usage": True}}
            connection.request("POST", path, json.dumps(asked), HEADERS)
            reply = connection.getresponse()
            if reply.status != 200:
                return Answered(reply.status, reply.read().decode(errors="replace"))
            for event in events(reply):
                usage = event.get("usage") or usage
                if "error" in event:
                    return Answered(int(event["error"].get("code") == "model_unavailable") * 3 + 500, str(event))
                if event.get("choices"):
                    first = first or time.perf_counter() - start
                    text.append(event["choices"][0].get("text") or "")
        return Answered(200, "".join(text), usage.get("completion_tokens", 0), first, time.perf_counter() - start)


def events(reply: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in reply:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


def our_server(checkpoint_dir: Path, log: Path, **flags: Any) -> ServerProcess:
    given = [part for name, value in flags.items() for part in (f"--{name}", value)]
    script = ROOT / "generate" / "serve.py"
    return ServerProcess([sys.executable, script, "--checkpoint_dir", checkpoint_dir, "--port", 0, *given], log)


def make_loras(checkpoint_dir: Path, folder: Path, n: int) -> list[str]:
    """Write n LoRAs into a folder, one and its perturbations, and return their names."""
    import torch

    from lit_gpt.checkpoints.base_model import BaseCheckpoint
    from lit_gpt.methods import finetuned_file, lora

    base, config = BaseCheckpoint.open(checkpoint_dir), lora.LoRAConfig()
    torch.manual_seed(0)
    shapes = finetuned_file.file_parameters(lora.skeleton(base.config, config))
    trained = {name: 0.03 * torch.randn(tensor.shape) for name, tensor in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"lora{i:04d}" for i in range(n)]
    for name in names:
        state = {key: tensor + 0.01 * torch.randn_like(tensor) for key, tensor in trained.items()}
        record = {"hyperparameters": asdict(config), "prompt_style": base.prompt_style.to_dict(), "quantize": None}
        finetuned_file.save_file(folder / f"{name}.pth", lora.NAME, base.fingerprint, state, **record)
    return names
