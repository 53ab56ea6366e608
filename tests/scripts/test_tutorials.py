"""Every command of tutorials/*.md is run, in the order of its page, on a tiny model that stands in for Falcon-7B; and
what the pages show, name and link is checked against that. A command that nothing here knows to run is a failure."""

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
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.hub import Hub
from helpers.paths import ROOT
from lit_gpt.cli import parse
from lit_gpt.data import packing
from lit_gpt.distributed import heartbeat
from lit_gpt.errors import UserError
from lit_gpt.text import prompt_style
from lit_gpt.training import checks
from lit_gpt.training.args import BatchArgs, TrainArgs

PAGES = sorted((ROOT / "tutorials").glob("*.md"))
BASE = "checkpoints/tiiuae/falcon-7b"
PLAN = ROOT / "scripts/plan.py"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins are for the CPU")

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
REFUSED = {"--strategy deepspeed": "DeepSpeed needs CUDA"}  # for want of what is not here
EXTRAS = {
    "--optimizer adamw8bit": "bitsandbytes",
    "--logger tensorboard": "tensorboard",
    "eval/lm_eval_harness.py": "lm_eval",
}
for used, module in EXTRAS.items():
    if importlib.util.find_spec(module) is None:
        REFUSED[used] = f"needs {module.replace('_', '-')}"

FINETUNE = f"python finetune/lora.py --checkpoint_dir {BASE} --data_dir data/alpaca --max_steps 2 --warmup_steps 0 "
FILMS = f"python scripts/prepare_json.py --checkpoint_dir {BASE} --json_path films.jsonl --destination_path "
EXPORT = "python scripts/convert_lit_checkpoint.py --checkpoint_dir out/falcon-7b-alpaca "
ANSWER = f"python generate/base.py --checkpoint_dir {BASE}"
SLURM = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_ID": "12345"}


def edit(path: str, change: Callable[[str], str]) -> Callable[[], None]:
    return lambda: Path(path).write_text(change(Path(path).read_text()))


def another_data() -> None:
    shutil.rmtree("data/alpaca")
    shutil.move("data/other", "data/alpaca")


def damage_states() -> None:
    for path in Path("out/lora/alpaca/state").iterdir():
        path.write_bytes(b"")


def out_of_memory() -> None:
    def pack(samples):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "pack", pack)
        in_process((FINETUNE + "--out_dir out/oom").split()[1:])


def without(package: str, command: str) -> Callable[[], None]:
    def refuse() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            in_process(shlex.split(command)[1:])

    return refuse


def probe_with_another_column() -> None:
    Path("probe.csv").write_text("txt\nThe cat sat.\n")
    in_process((FINETUNE + "--out_dir out/x --probe_path probe.csv").split()[1:])


def two_ranks(**flags) -> Callable[[], None]:
    """What two ranks refuse, asked of the check itself."""

    def check() -> None:
        with pytest.raises(UserError) as refused:
            checks.check_batch(TrainArgs(batch=BatchArgs(**flags)), world_size=2)
        print(f"error: {refused.value}")

    return check


def lost_template() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_style.PromptStyle, "write_template", lambda *_: None)
        in_process((EXPORT + "--out_dir out/x").split()[1:])


def another_base() -> None:
    path = Path("out/lora/wide/lit_model_lora_finetuned.pth")
    torch.save(torch.load(path) | {"base": "0123456789abcdef"}, path)


def lost_rank() -> None:  # tests/test_devices.py kills one
    print(f"error: rank 0: lost touch with another process of the run{heartbeat.Heartbeat.ADVICE}")


# What goes wrong on each page: commands, with variables of the environment, and what must happen before them.
MISTAKES = {
    "finetune_lora.md": [
        FINETUNE + "--out_dir out/x --warmup_steps 100",
        FINETUNE + "--out_dir out/lora/alpaca",
        FINETUNE + "--out_dir out/x --lora_query false --lora_value false",
        edit("data/alpaca/data.json", lambda text: re.sub(r'("tokenizer": ")\w+', r"\1other", text)),
        FINETUNE + "--out_dir out/x",
    ],
    "finetune_adapter.md": [
        FINETUNE.replace("lora", "adapter") + "--out_dir out/x",
        f"python generate/adapter_v2.py --checkpoint_dir {BASE} --prompt x "
        "--adapter_path out/adapter/alpaca/lit_model_adapter_finetuned.pth",
    ],
    "finetune_full.md": [
        FINETUNE.replace("lora", "full") + f"--out_dir {BASE}",
        FINETUNE.replace("lora", "full") + "--out_dir out/x --optimizer_in_backward true",
    ],
    "many_devices.md": [
        lost_rank,
        two_ranks(batch_size=5),
        two_ranks(batch_size=4, optimizer_in_backward=True),
    ],
    "many_devices_torchrun.md": [
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, FINETUNE + "--out_dir out/x")
    ],
    "many_devices_fabric_run.md": [
        ({"LT_CLI_USED": "1", "LT_DEVICES": "1", "LT_PRECISION": "bf16"}, FINETUNE + "--out_dir out/x"),
        ({"LT_CLI_USED": "1", "LT_DEVICES": "1"}, FINETUNE + "--out_dir out/x --devices 2"),
        ({"LT_CLI_USED": "1", "LT_STRATEGY": "deepspeed_stage_3"}, FINETUNE + "--out_dir out/x"),
    ],
    "many_devices_slurm.md": [
        (SLURM | {"SLURM_NTASKS_PER_NODE": "2"}, FINETUNE + "--out_dir out/x"),
        (SLURM, FINETUNE + "--out_dir out/x --devices 2"),
    ],
    "generate.md": [
        f"{ANSWER} --prompt_file prompts.jsonl --out answers.jsonl --temperature 0",
        edit("prompts.jsonl", lambda text: text + '{"question": "who?"}\n'),
        f"{ANSWER} --prompt_file prompts.jsonl --out answers.jsonl --max_new_tokens 4",
        f"{ANSWER} --prompt dog --max_new_tokens 3000",
        another_base,
        f"{ANSWER} --prompt_file mixed.jsonl --out x.jsonl",
    ],
    "quantize.md": [
        f"python generate/base.py --checkpoint_dir {BASE}-nf4 --quantize nf4 --prompt x",
        f"python generate/lora.py --checkpoint_dir {BASE} --quantize int8 --prompt x "
        "--lora_path out/lora/qlora/lit_model_lora_finetuned.pth",
        FINETUNE.replace("lora", "full") + "--out_dir out/x --quantize nf4",
        FINETUNE + "--out_dir out/x --quantize nf4 --strategy fsdp",
        f"python scripts/convert_lit_checkpoint.py --checkpoint_dir {BASE}-nf4 --out_dir out/x",
    ],
    "resume.md": [
        FINETUNE + "--out_dir out/lora/alpaca --resume auto --max_steps 40 --batch_size 4 --learning_rate 0.1",
        FINETUNE + "--out_dir out/lora/alpaca",
        another_data,
        FINETUNE + "--out_dir out/lora/alpaca --resume auto --max_steps 40 --batch_size 4",
        damage_states,
        FINETUNE + "--out_dir out/lora/alpaca --resume auto --max_steps 40 --batch_size 4",
    ],
    "evaluate.md": [
        probe_with_another_column,
        without("lm_eval", f"python eval/lm_eval_harness.py --checkpoint_dir {BASE} --tasks gsm8k"),
    ],
    "monitor.md": [
        "python scripts/report.py data/alpaca",
        without("wandb", FINETUNE + "--out_dir out/x --logger wandb"),
    ],
    "out_of_memory.md": [
        out_of_memory,
        without("bitsandbytes", FINETUNE + "--out_dir out/b --optimizer adamw8bit"),
        FINETUNE.replace("lora", "full") + "--out_dir out/x --optimizer_in_backward true --batch_size 8",
    ],
    "export.md": [
        lost_template,
        EXPORT + "--out_dir out/falcon-7b-alpaca-hf",
        f"{EXPORT} --out_dir out/x --format gguf --lora_path out/lora/alpaca/lit_model_lora_finetuned.pth",
        FINETUNE + "--out_dir out/x --lora_r 4 --lora_path out/lora/from-peft/lit_model_lora_finetuned.pth",
        edit("out/falcon-7b-alpaca-peft/adapter_config.json", lambda text: text.replace('dora": false', 'dora": true')),
        f"python scripts/convert_peft_adapter.py --checkpoint_dir {BASE} --out_dir out/x "
        "--peft_dir out/falcon-7b-alpaca-peft",
    ],
    "custom_data.md": [
        FILMS.replace("films.jsonl", "quiz.csv") + "data/x",
        FILMS + "data/films",
        FILMS + "data/x --max_seq_length 20",
        edit("films.jsonl", lambda text: text.replace(", ", " ")),
        FILMS + "data/x",
        edit("chats.json", lambda text: text.replace("role", "speaker")),
        FILMS.replace("films.jsonl", "chats.json") + "data/x",
    ],
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The commands of a piece of shell, continued lines joined; a here-document goes with the command that reads it."""
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
    return "scripts/plan.py" in command


@pytest.fixture
def place(llama, tmp_path, monkeypatch) -> Path:
    """A folder like the repository's root, with rows in Alpaca's form."""
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
    """`python ARGV...`, without importing torch anew. Returns the exit code."""
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
    found = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word in names]
    return found[-1] if found else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Reader:
    """Runs a page's commands one after another."""

    def __init__(self, page: str, place: Path, llama: Path, capfd) -> None:
        self.page, self.place, self.llama, self.capfd = page, place, llama, capfd
        self.steps, self.output = STEPS.get(page, 2), ""
        self.first_node: subprocess.Popen | None = None
        self.port = free_port()

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
        """The flags with those of the table."""
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
        if option(argv, "--devices") in (None, "1"):
            return in_process(argv, stdin="hello\n" if script.startswith("chat/") else "")
        assert option(argv, "--devices") == "2", "on one machine the pages have two"
        return subprocess.run([sys.executable, *argv], timeout=120).returncode

    def interrupt(self, out_dir: Path) -> None:
        """SIGTERM to this process, in which the run is, once it has taken steps."""
        seen = len(rows(out_dir))
        while len(rows(out_dir)) < seen + 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    def download(self, flags: list[str]) -> int:
        """From a hub on the loopback that has the stand-in."""
        files = {p.name: p.read_bytes() for p in self.llama.iterdir() if not p.name.startswith("lit_")}
        with Hub(files, repo_id=option(flags, "--repo_id")) as hub:
            kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
            env = kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(self.place / "hf")}
            return subprocess.run([sys.executable, "scripts/download.py", *flags], env=env, timeout=60).returncode

    def launch(self, launcher: str, words: list[str]) -> int:
        """torchrun or fabric run: the launcher in this process, its workers in their own."""
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
        """The job's command as two tasks on one machine, with the variables that srun sets."""
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

    def make_mistakes(self) -> None:
        for mistake in MISTAKES.get(self.page, ()):
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
    path = out_dir / "metrics.csv"
    return path.read_text().splitlines() if path.exists() else []


def launched_from_here(launcher: str, argv: list[str]) -> int:
    import logging

    from lightning.fabric.cli import _main
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


@pytest.mark.subprocess
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_does_what_it_says(page, place, llama, capfd):
    """Its commands run, its mistakes are refused, and the lines that it shows were seen, numbers apart."""
    wanted = [command for block in blocks(page, "bash") for command in commands(block)]
    assert wanted
    wanted = [command for command in wanted if not is_plan(command)]
    if not any("download.py" in command for command in wanted):
        shutil.copytree(llama, BASE)
    made = any("prepare_alpaca.py" in command and "destination" not in command for command in wanted)
    for name, seed in (("other", 1),) if made else (("alpaca", 0), ("other", 1)):
        argv = ["--json_path", "alpaca.jsonl", "--destination_path", f"data/{name}", "--seed", str(seed)]
        assert in_process(["scripts/prepare_json.py", "--checkpoint_dir", str(llama), *argv]) == 0
    reader = Reader(page.name, place, llama, capfd)
    try:
        reader.read(wanted)
    finally:
        if reader.first_node:
            reader.first_node.terminate()
    reader.make_mistakes()
    seen = normal(reader.output)
    for block in blocks(page, "text"):
        for line in block.splitlines():
            assert normal(line) in seen, (line, reader.output)


def normal(text: str) -> str:
    """With every number as #, and runs of blanks as one."""
    return re.sub(r"\s+", " ", re.sub(r"\d+([.,]\d+)*(e[+-]?\d+)?", "#", text)).strip()


@pytest.mark.skipif(not PLAN.exists(), reason="scripts/plan.py is not here")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if is_plan(page.read_text("utf-8"))], ids=lambda page: page.stem
)
def test_plans(page, place, llama, capfd):
    shutil.copytree(llama, BASE)
    for command in [c for block in blocks(page, "bash") for c in commands(block) if is_plan(c)]:
        code, (out, err) = in_process(shlex.split(command)[1:]), capfd.readouterr()
        assert code in (0, 1) and out and "Traceback" not in err, (command, err)  # 1: it may say that nothing fits


SCRIPT_OF = {"finetune_adapter.md": "adapter", "finetune_full.md": "full", "custom_data.md": "../scripts/prepare_json"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_defaults_and_links(page):
    """Rows `--flag | default` have the script's own default; links lead to files and headings that exist."""
    text = page.read_text(encoding="utf-8")
    script = (ROOT / "finetune" / f"{SCRIPT_OF.get(page.name, 'lora')}.py").resolve()
    defaults = vars(parse(runpy.run_path(str(script)), []))
    # a page of a launcher has a table of the launcher's flags
    table = text.partition("## Hyperparameters that matter")[2].partition("\n## ")[0]
    for name, value in re.findall(r"^\| `--(\w+)` \| (\S+) \|", table, re.MULTILINE):
        shown = json.loads(value) if re.fullmatch(r"[\d.]+|true|false|null", value) else value
        assert defaults[name] == shown, (name, defaults[name])
    for target, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
        to = (page.parent / target).resolve() if target else page
        assert to.exists(), target
        headings = re.findall(r"^#+ (.*)$", to.read_text(encoding="utf-8"), re.MULTILINE)
        assert not heading or heading in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]


def test_readme_lists_the_pages():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"(tutorials/{page.name})" in readme for page in PAGES)
