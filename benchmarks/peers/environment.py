"""LitGPT beside us: an environment of its own, and the checkpoint in its format, made by its own command."""

import shutil
import subprocess
import sys
from pathlib import Path

from lit_gpt.errors import UserError

REQUIREMENTS = ("litgpt==0.5.13", "requests")  # it imports requests without asking for it


def litgpt_python(peers_dir: Path, torch_version: str) -> Path:
    """The interpreter of LitGPT's environment, made if it is not there."""
    folder = (peers_dir / "litgpt").absolute()
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        print(f"installing {REQUIREMENTS[0]} into {folder}", file=sys.stderr)
        run("making LitGPT's environment", [sys.executable, "-m", "venv", "--clear", folder])
        # first and alone, so that pip takes the build that it takes for everybody on this machine
        run(
            "installing its torch",
            [python, "-m", "pip", "install", "--quiet", f"torch=={torch_version.partition('+')[0]}"],
        )
        run("installing it", [python, "-m", "pip", "install", "--quiet", *REQUIREMENTS])
        done.touch()
    return python


def litgpt_checkpoint(python: Path, checkpoint_dir: Path, folder: Path, name: str) -> Path:
    """The Hugging Face files of `checkpoint_dir`, converted by LitGPT, in `folder`."""
    folder.mkdir()
    for pattern in ("*.json", "*.safetensors", "tokenizer.model"):
        for path in checkpoint_dir.glob(pattern):
            if path.name != "lit_config.json":
                shutil.copy(path, folder)
    litgpt = python.parent / "litgpt"
    run(f"converting for {name}", [litgpt, "convert_to_litgpt", folder.absolute(), "--model_name", name])
    return folder.absolute()


def run(what: str, argv: list) -> None:
    """Run a command; if it fails, its last line is the error. `what` it does names it, for its arguments are places."""
    process = subprocess.run(list(map(str, argv)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if process.returncode:
        last = (process.stdout.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{what} failed: {last}")
