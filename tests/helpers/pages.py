"""Run the commands of a page of documentation, in order, on a tiny model that stands in for Falcon-7B."""

import importlib.util
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import pytest

from helpers.hub import Hub
from helpers.paths import ROOT

BASE = "checkpoints/tiiuae/falcon-7b"

# What a tiny model and little data need besides the page's own flags; of a flag given twice the last counts.
EXTRA = {
    "scripts/prepare_alpaca.py": "--json_path alpaca.jsonl",
    "scripts/quantize.py": "--calibration_tokens 256",
    "finetune/adapter": "--adapter_start_layer 1",
    "finetune/": "--warmup_steps 0",
    "generate/": "--max_new_tokens 4",
    "chat/": "--max_new_tokens 4",
    "eval/lm_eval": f"--include_path {ROOT}/tests/evaluation/lm_eval_tasks --tasks animals_choice,animals_answer",
}
STEPS = {"resume.md": 40}  # enough to be stopped in between; elsewhere 2
# two processes on one machine, whatever the page has
LAUNCHED = {
    "torchrun": "--nproc_per_node {processes} --master_addr 127.0.0.1 --master_port {port}",
    "fabric": "--main-port {port}",
}
REFUSED: dict[str, str] = {}  # for want of what is not here
EXTRAS = {
    "--optimizer adamw8bit": "bitsandbytes",
    "--logger tensorboard": "tensorboard",
    "eval/lm_eval_harness.py": "lm_eval",
}
for used, module in EXTRAS.items():
    if importlib.util.find_spec(module) is None:
        REFUSED[used] = f"needs {module}"
SLURM = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_ID": "12345"}


def blocks(page: Path, language: str) -> list[str]:
    """Return the contents of a page's fenced blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Return the commands of a piece of shell, continued lines joined, each here-document with what reads it."""
    found, lines = [], iter(text.splitlines())
    for line in lines:
        while line.endswith("\\"):
            line = line[:-1] + " " + next(lines).strip()
        if opened := re.search(r"<<'(\w+)'$", line):
            body = "".join(f"{rest}\n" for rest in iter(lambda: next(lines), opened[1]))  # noqa: B023
            line += f"\n{body}{opened[1]}\n"
        if line.strip() and not line.startswith("#"):
            found.append(line)
    return found


def is_plan(command: str) -> bool:
    """Tell whether a command runs scripts/plan.py, which asks for no checkpoint and may answer that nothing fits."""
    return "scripts/plan.py" in command


def enter_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder like the repository's root, with rows in Alpaca's form, and go there."""
    for name in ("scripts", "finetune", "generate", "chat", "eval", "tests", "lit_gpt"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "data").mkdir()
    words = [f"{a}{b}" for a in ("cat", "dog", "cow", "hen", "fox") for b in "abcdef"]
    rows = [{"instruction": f"Say {word}.", "input": "", "output": word} for word in words]
    (tmp_path / "alpaca.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in os.environ:
        if name.startswith(("SLURM_", "LT_", "TORCHELASTIC_")) or name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def in_process(argv: list[str], stdin: str = "") -> int:
    """Run `python ARGV...` without importing torch anew, and return the exit code."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            runpy.run_path(argv[0], run_name="__main__")
            return 0
        except SystemExit as exit_:
            return exit_.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def option(argv: list[str], *names: str) -> str | None:
    """Return the last value that the flags give to any of these names."""
    found = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word in names]
    return found[-1] if found else None


DATA_DIR = ("--out_dir", "--destination_path")  # where scripts/prepare_alpaca.py and prepare_json.py write


def free_port() -> int:
    """Return a port of the loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Reader:
    """Run a page's commands one after another."""

    def __init__(self, page: str, place: Path, llama: Path, capfd) -> None:
        self.page, self.place, self.llama, self.capfd = page, place, llama, capfd
        self.steps, self.output = STEPS.get(page, 2), ""
        self.first_node: subprocess.Popen | None = None
        self.port = free_port()
        self.server: subprocess.Popen | None = None

    def read(self, commands: list[str]) -> None:
        """Run them all. Each must end as it should."""
        for i, command in enumerate(commands):
            signalled = i + 1 < len(commands) and commands[i + 1].startswith("kill ")
            self.capfd.readouterr()
            code = self.run(command, signalled)
            self.keep_output()
            refusal = next((words for flag, words in REFUSED.items() if flag in command), None)
            errors = [line for line in self.last.splitlines() if line.startswith("error: ")]
            if refusal:
                assert code == 2 and len(errors) == 1 and refusal in errors[0], (command, self.last)
            else:
                assert code == 0 and not errors, (command, self.last)
            assert signalled == ("--resume auto goes on" in self.last), (command, self.last)
        assert self.first_node is None, "of the commands for two machines the second is missing"

    def keep_output(self) -> None:
        self.last = "".join(self.capfd.readouterr())
        self.output += self.last

    def run(self, command: str, signalled: bool = False) -> int:
        argv = shlex.split(command) if "\n" not in command else []
        match argv:
            case []:
                assert command.startswith("cat > "), f"not known here: {command}"
                return subprocess.run(command, shell=True).returncode
            case ["python", "scripts/download.py", *rest]:
                return self.download(rest)
            case ["python", "generate/serve.py", *rest]:
                return self.serve(rest)
            case ["curl", *rest]:
                argv = ["curl", "--silent", "--fail-with-body", *rest]
                return subprocess.run([word.replace(":8000", f":{self.port}") for word in argv]).returncode
            case ["python", script, *rest]:
                return self.python(script, rest, signalled)
            case ["torchrun" | "fabric" as launcher, *rest]:
                return self.launch(launcher, rest)
            case ["sbatch", script]:
                return self.slurm(Path(script).read_text())
            case ["scancel", "--signal=TERM", job] if job.isdecimal():
                return 0  # SIGTERM itself is sent on another page
            case ["kill", "-TERM", "PID"]:
                return 0  # sent while the command before it ran
        raise AssertionError(f"not known here: {command}")

    def extended(self, script: str, flags: list[str]) -> list[str]:
        """Return the flags with those of the table EXTRA."""
        for start, extra in EXTRA.items():
            if script.startswith(start):
                flags = [*flags, *extra.split()]
        if script.startswith("finetune/"):
            flags += ["--max_steps", str(self.steps)]
            flags += [] if "--batch_size" in flags else ["--batch_size", "4"]
        states = sorted(Path("out/lora/alpaca/state").glob("*.pth"))
        return [word.replace("step_00000100.pth", states[-1].name) if states else word for word in flags]

    def python(self, script: str, flags: list[str], signalled: bool) -> int:
        assert (ROOT / script).is_file(), f"no such script: {script}"
        argv = [script, *self.extended(script, flags)]
        if signalled:
            threading.Thread(target=self.interrupt, args=(Path(option(argv, "--out_dir")),), daemon=True).start()
        if option(argv, "--devices") in (None, "1", "auto"):
            return in_process(argv, stdin="hello\n" if script.startswith("chat/") else "")
        assert option(argv, "--devices") == "2", "on one machine the pages have two"
        return subprocess.run([sys.executable, *argv], timeout=120).returncode

    def serve(self, flags: list[str]) -> int:
        """Start a server for the commands that follow, in place of one before, and return when it is there."""
        self.end_server()
        argv = [sys.executable, "generate/serve.py", *flags, "--port", str(self.port)]
        self.server = subprocess.Popen(argv)
        while self.server.poll() is None:
            try:  # the port is open before the model is loaded: only an answer tells that it is there
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=60).close()
                return 0
            except OSError:
                time.sleep(0.1)
        return self.server.returncode

    def end_server(self) -> None:
        """Tell the server that is there, if one is, to stop, which it does with success."""
        if self.server:
            self.server.terminate()
            assert self.server.wait(timeout=60) == 0

    def interrupt(self, out_dir: Path) -> None:
        """Send SIGTERM to this process, in which the run is, once it has taken steps."""
        seen = len(rows(out_dir))
        while len(rows(out_dir)) < seen + 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    def download(self, flags: list[str]) -> int:
        """Download from a hub on the loopback that has the stand-in."""
        files = {p.name: p.read_bytes() for p in self.llama.iterdir() if not p.name.startswith("lit_")}
        with Hub(files, repo_id=option(flags, "--repo_id")) as hub:
            kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
            env = kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(self.place / "hf")}
            return subprocess.run([sys.executable, "scripts/download.py", *flags], env=env, timeout=60).returncode

    def launch(self, launcher: str, words: list[str]) -> int:
        """Run torchrun or fabric run: the launcher in this process, its workers in their own."""
        if launcher == "fabric":
            assert words.pop(0) == "run"
        at = next(i for i, word in enumerate(words) if word.startswith("finetune/"))
        own, script, flags = words[:at], words[at], words[at + 1 :]
        nodes, node = int(option(own, "--nnodes") or 1), option(own, "--node_rank") or "0"
        own += LAUNCHED[launcher].format(processes=2 // nodes, port=self.port).split()
        told = own if launcher == "fabric" else flags
        if launcher == "torchrun":
            assert option(flags, "--devices") == option(own[: -len(LAUNCHED[launcher].split())], "--nproc_per_node")
            assert int(option(flags, "--num_nodes") or 1) == nodes
            flags = [*flags, "--devices", str(2 // nodes)]
        assert option(told, "--devices") == "2" or nodes == 2
        argv = [*own, script, *self.extended(script, flags)]
        executable = Path(sys.executable).with_name(launcher)
        assert executable.exists()
        if nodes == 2 and node == "0":  # waits for the other
            self.first_node = subprocess.Popen([executable, *argv])
            return 0
        code = launched_from_here(launcher, argv)
        if nodes == 2:
            code, self.first_node = max(code, abs(self.first_node.wait(timeout=120))), None
        self.port = free_port()
        return code

    def slurm(self, script: str) -> int:
        """Run the job's command as two tasks on one machine, with the variables that srun sets."""
        wants = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script, re.MULTILINE))
        assert set(wants) >= {"nodes", "ntasks-per-node", "gpus-per-node", "signal"}
        (command,) = commands("\n".join(line for line in script.splitlines() if not line.startswith("#")))
        srun, python, name, *flags = shlex.split(command)
        assert (srun, python) == ("srun", "python")
        assert option(flags, "--devices") == wants["ntasks-per-node"] == wants["gpus-per-node"]
        assert option(flags, "--num_nodes") == wants["nodes"]
        argv = [sys.executable, name, *self.extended(name, flags), "--devices", "2", "--num_nodes", "1"]
        job = SLURM | {"SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODELIST": "127.0.0.1"}
        job |= {"SLURM_JOB_NAME": wants["job-name"], "MASTER_PORT": str(self.port)}
        ranks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
        tasks = [subprocess.Popen(argv, env=os.environ | job | rank) for rank in ranks]
        return max(task.wait(timeout=120) for task in tasks)

    def make_mistakes(self, mistakes: Iterable) -> None:
        """Run what must be refused in one line, and call what must happen before it."""
        for mistake in mistakes:
            self.capfd.readouterr()
            if callable(mistake):
                mistake()
                self.keep_output()
                continue
            variables, command = mistake if isinstance(mistake, tuple) else ({}, mistake)
            with pytest.MonkeyPatch.context() as patch:
                for name, value in variables.items():
                    patch.setenv(name, value)
                code = in_process(shlex.split(command)[1:])
            self.keep_output()
            assert code and "Traceback" not in self.last and self.last.count("error: ") == 1, (command, self.last)


def rows(out_dir: Path) -> list[str]:
    """Return the lines of a run's metrics.csv, none before it is there."""
    path = out_dir / "metrics.csv"
    return path.read_text().splitlines() if path.exists() else []


def launched_from_here(launcher: str, argv: list[str]) -> int:
    """Run a launcher in this process, undo what it sets here, and return the exit code."""
    import logging

    from lightning_fabric.cli import _main
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    before, handlers = dict(os.environ), {n: signal.getsignal(n) for n in signal.valid_signals() if 0 < n < 32}
    try:
        main(argv) if launcher == "torchrun" else _main(["run", *argv], standalone_mode=False)
        return 0
    except ChildFailedError:
        return 1
    finally:
        os.environ.clear()
        os.environ.update(before)
        for number, handler in handlers.items():
            if handler is not None and number not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(number, handler)
        logging.captureWarnings(False)


def run_page(name: str, wanted: list[str], place: Path, llama: Path, capfd) -> Reader:
    """Run the commands of the page `name`, apart from those of scripts/plan.py, and return what ran them.

    The model and the data that the commands do not make themselves are put in place before.
    """
    assert wanted
    wanted = [command for command in wanted if not is_plan(command)]
    if not any("download.py" in command for command in wanted):
        shutil.copytree(llama, BASE)
    made = any("prepare_" in c and option(shlex.split(c), *DATA_DIR) in (None, "data/alpaca") for c in wanted)
    for folder, seed in (("other", 1),) if made else (("alpaca", 0), ("other", 1)):
        argv = ["--json_path", "alpaca.jsonl", "--destination_path", f"data/{folder}", "--seed", str(seed)]
        assert in_process(["scripts/prepare_json.py", "--checkpoint_dir", str(llama), *argv]) == 0
    reader = Reader(name, place, llama, capfd)
    try:
        reader.read(wanted)
    finally:
        if reader.first_node:
            reader.first_node.terminate()
        reader.end_server()
    return reader
