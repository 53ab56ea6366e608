"""Refuses what flags and files tell before the model is loaded. Nothing here imports torch, which takes seconds."""

import ipaddress
import os
from collections.abc import Iterable
from pathlib import Path

from lit_gpt.checkpoints.folder import check_inputs
from lit_gpt.errors import UsageError, UserError, reason
from lit_gpt.model.config import Config
from lit_gpt.serving.args import ServeArgs

KEY_VARIABLE = "LIT_GPT_API_KEY"
FILE = "lit_model_lora_finetuned.pth"  # what finetune/lora.py writes into a folder of its own


def check_early(
    args: ServeArgs, checkpoint_dir: Path, loras: Iterable[str], loras_dir: Path | None, finetuned_path: Path | None
) -> tuple[dict[str, Path], str | None]:
    """Return the LoRA files by name and the API key, once all that can be known without torch is in order.

    Raises:
        UserError: a file or folder is not what it should be.
        UsageError: flags contradict each other.
    """
    if (loras or loras_dir) and finetuned_path:
        flag = "--loras" if loras else "--loras_dir"
        raise UsageError(f"{flag}: goes with the base, not with --finetuned_path; give one of them")
    if args.port > 65535:
        raise UsageError(f"--port {args.port}: expected a port from 1 to 65535, or 0 for a free one")
    named, key = named_files(loras), read_key(args)
    check_inputs(checkpoint_dir, finetuned_path)
    for path in named.values():
        check_inputs(checkpoint_dir, path, "lora", flag="--loras")
    if loras_dir:
        files_in(loras_dir)
    args.context_of(Config.from_checkpoint(checkpoint_dir).block_size)
    return named, key


def named_files(arguments: Iterable[str]) -> dict[str, Path]:
    """Return {name: file} of arguments NAME=FILE. Raises UsageError for others, or a name that comes twice."""
    named: dict[str, Path] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not (name and equals and path):
            raise UsageError(f"--loras {argument}: expected NAME=FILE, such as alpaca=out/lora/alpaca/{FILE}")
        if name in named:
            raise UsageError(f"--loras {argument}: the name {name} comes twice; choose another")
        named[name] = Path(path).expanduser()
    return named


def files_in(folder: Path) -> dict[str, Path]:
    """Return the LoRA files in a folder by name: NAME.pth, or NAME/lit_model_lora_finetuned.pth.

    Raises:
        UsageError: the folder cannot be read.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UsageError(f"--loras_dir {folder}: cannot be read ({error.strerror}); give a folder of LoRAs") from None
    found: dict[str, Path] = {}
    for entry in entries:
        if entry.name.startswith("."):  # among them what is being written
            continue
        path = Path(entry.path)
        if path.suffix == ".pth":
            found.setdefault(path.stem, path)
        elif (path / FILE).is_file():
            found.setdefault(path.name, path / FILE)
    return found


def read_key(args: ServeArgs) -> str | None:
    """Return the API key that the file or the environment has, or None.

    Raises:
        UsageError: the host is not the loopback, and there is no key.
        UserError: the file cannot be read, or is empty.
    """
    key = os.environ.get(KEY_VARIABLE) or None
    if args.api_key_file is not None:
        key = key_in(args.api_key_file)
    if key is None and not is_loopback(args.host):
        raise UsageError(
            f"--host {args.host}: others can reach it; set {KEY_VARIABLE} or give --api_key_file, or leave out --host"
        )
    return key


def key_in(path: Path) -> str:
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api_key_file {path}: cannot be read ({reason(error)})") from None
    if not key:
        raise UserError(f"--api_key_file {path}: is empty; expected the API key")
    return key


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
