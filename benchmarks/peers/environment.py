"""What a benchmark makes before it begins: LitGPT's environment and its copy of the checkpoint, random checkpoints."""

import json
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


def random_model(model: str, fields: dict, rows: int, seed: int, folder: Path) -> tuple[Path, Path]:
    """A checkpoint of random weights and as many random rows, made in `folder` by a process whose memory goes with it.

    Args:
        model, fields: a preset's name, and fields of config.json that replace its own.
    """
    what = {"model": model, "fields": fields, "rows": rows, "seed": seed, "folder": str(folder)}
    run(f"making a random {model}", [sys.executable, Path(__file__).parent / "synthetic.py", json.dumps(what)])
    return folder / "checkpoint", folder / "data"


def run(what: str, argv: list) -> None:
    """Run a command; if it fails, its last line is the error. `what` it does names it, for its arguments are places."""
    process = subprocess.run(list(map(str, argv)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if process.returncode:
        last = (process.stdout.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{what} failed: {last}")
