"""The orchestrator's end of a contestant's process."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lit_gpt.errors import UserError

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SCRIPTS = {
    "gemm": "gemm.py",
    "ours": "ours.py",
    "peft": "hf.py",
    "peft_tuned": "hf.py",
    "litgpt": "litgpt_lora.py",
}


class Contestant:
    """A process that has loaded its model and waits, and what it has answered.

    Raises:
        UserError: it ended before it was asked to; its last words are given.
    """

    def __init__(
        self,
        name: str,
        job: dict[str, Any],
        folder: Path,
        python: Path | str = sys.executable,
        script: str | None = None,
        caches: str | None = None,
    ) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        path = folder / f"{name}.json"
        path.write_text(json.dumps(job | {"contestant": name}), encoding="utf-8")
        env = dict(os.environ)
        env.pop("PYTHONPATH", None)
        if name != "litgpt":  # which must see nothing but its own environment
            env["PYTHONPATH"] = str(ROOT)
        if caches:
            env["XDG_CACHE_HOME"] = caches
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [str(python), str(HERE / (script or SCRIPTS[name])), str(path)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env, cwd=ROOT,
            )  # fmt: skip
        self.answers: list[dict[str, Any]] = []

    def ready(self) -> dict[str, Any]:
        """Wait until it has loaded its model; what it says of itself."""
        self.about = self.answer()
        return self.about

    def step(self, n: int) -> dict[str, Any]:
        self.process.stdin.write(json.dumps({"step": n}) + "\n")
        self.process.stdin.flush()
        self.answers.append(self.answer())
        return self.answers[-1]

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            said = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
            raise UserError(f"{self.name}: ended with {self.process.returncode}: {said[-1] if said else 'no output'}")
        return json.loads(line)

    def cpu_seconds(self) -> float:
        """Processor time that all its threads have used; proc(5)."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def seconds_to_first_step(name: str, job: dict[str, Any], folder: Path, python: Path | str) -> float:
    """From launching the process to its first finished optimizer step, with the machine to itself and nothing compiled
    before: our kernels are kept where caches are, and it gets an empty place for them."""
    start = time.perf_counter()
    contestant = Contestant(name, job, folder, python, caches=f"{job['out_dir']}.caches")
    try:
        contestant.ready()
        contestant.step(0)
        return time.perf_counter() - start
    finally:
        contestant.stop()
