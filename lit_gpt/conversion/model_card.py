"""Write what goes beside an export for those who will use it: the model card, and the figures of the check."""

import hashlib
import json
import re
import shutil
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lit_gpt.files import read_json
from lit_gpt.methods.registry import flag_prefixes
from lit_gpt.text.tokenizer import Tokenizer, has_tokenizer

# Files that a finetune leaves and a folder made from it keeps, for the card of what is made from that folder.
RUN_FILES = ("hyperparameters.json", "summary.json", "metrics.csv", "loss.png")
PACKAGES = ("torch", "transformers", "peft", "gguf", "tokenizers")
SHOWN = (  # of the hyperparameters; those of the method besides
    "learning_rate", "weight_decay", "warmup_steps", "schedule", "optimizer", "epochs", "max_steps", "batch_size",
    "precision", "seed",
)  # fmt: skip
AUDIT = ("rows_kept", "tokens", "tokens_supervised")


def copy_run(source: Path, target: Path) -> None:
    """Copy the records that a finetune has left in a folder."""
    for name in RUN_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write(
    folder: Path,
    name: str,
    checkpoint_dir: Path,
    run_dir: Path,
    use: str,
    library: str,
    figures: dict[str, Any],
) -> None:
    """Write README.md, with loss.png and the base's license where there is one, and export.json.

    Args:
        name: the export's name.
        checkpoint_dir: the folder of the base, or of a finetuned checkpoint that knows its own.
        run_dir: where the finetune left its records; it need have none.
        use: code that loads the export.
        library: the hub's name for the library that loads it.
        figures: those of the check, and the hashes of what the export was made from.
    """
    figures = {
        **figures,
        "versions": versions(),
        "sha256": {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()},
    }
    run, summary = (read_json(run_dir / name, missing_ok=True) for name in ("hyperparameters.json", "summary.json"))
    run.pop("lora_path", None)  # a place on this machine
    if run.get("max_steps"):  # in place of epochs
        run.pop("epochs", None)
    base = Path(run.get("checkpoint_dir") or checkpoint_dir)
    license_name = license_of(base, folder)
    head = {
        "base_model": repository(base),
        "library_name": library,
        "license": license_name,
        "pipeline_tag": "text-generation",
        "tags": ["lit-gpt", *([summary["method"]] if "method" in summary else [])],
    }
    parts = [
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in head.items() if value) + "---",
        f"# {name}",
        f"Made by Lit-GPT from {repository(base) or base.name}.",
        f"```python\n{use}\n```",
        training_data(run),
        table("Hyperparameters", {k: v for k, v in run.items() if k in SHOWN or k.startswith(flag_prefixes())}),
        losses(summary, run_dir, folder),
        checked(figures),
        f"## License\n\n{license_name or 'The folder of the base does not tell one.'}",
    ]
    (folder / "README.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    (folder / "export.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def repository(folder: Path) -> str | None:
    """Return owner/name of a folder where scripts/download.py put it, else None."""
    parts = folder.resolve().parts
    return "/".join(parts[-2:]) if parts[-3:-2] == ("checkpoints",) else None


def license_of(base: Path, folder: Path) -> str | None:
    """Return the license that the base's own card names, and copy its text into `folder`."""
    for path in base.glob("LICENSE*"):
        shutil.copyfile(path, folder / path.name)
    card = base / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    named = re.search(r"^license: *[\"']?([^\s\"']+)", head[1], re.MULTILINE) if head else None
    return named[1] if named else "other" if any(base.glob("LICENSE*")) else None


def training_data(run: dict[str, Any]) -> str:
    """Return the card's part on the data of a run; empty where the run names none."""
    if not run.get("data_dir"):
        return ""
    audit = read_json(Path(run["data_dir"]) / "data.json", missing_ok=True).get("audit", {})
    rows = {f"{split}: {key}": audit[split][key] for split in audit for key in AUDIT if key in audit[split]}
    return table("Data", {"prepared data": Path(run["data_dir"]).name, **rows})


def losses(summary: dict[str, Any], run_dir: Path, folder: Path) -> str:
    """Return the card's part on the training, and copy its loss.png into `folder`."""
    if not summary:
        return ""
    keys = ("method", "base_quantization", "trainable_parameters", "steps", "tokens", "val_loss_first", "val_loss_last")
    text = table("Training", {key: summary[key] for key in keys if summary.get(key) is not None})
    if not (run_dir / "loss.png").is_file():
        return text
    if not (folder / "loss.png").exists():
        shutil.copyfile(run_dir / "loss.png", folder / "loss.png")
    return text + "\n\n![loss over tokens](loss.png)"


def checked(figures: dict[str, Any]) -> str:
    """Return the card's part on the comparison with the source."""
    text = (
        f"## Checked\n\nRead back by {figures['reader']} before it was written: its logits differ from the source's by "
        f"{figures['logits_difference']:.1e} of their norm (allowed: {figures['logits_difference_allowed']:.0e}); "
        f"{figures['texts_compared']} texts have the same tokens and {figures['conversations_compared']} conversations "
        "the same prompts. The figures and hashes are in export.json."
    )
    if "trained_on" in figures:
        moved = figures["logits_difference_from_training"]
        text += f" It was trained on a base in {figures['trained_on']}; full weights move its logits by {moved:.1e}."
    return text


def table(title: str, rows: dict[str, Any]) -> str:
    """Return a titled Markdown table of names and values; empty without rows."""
    lines = [f"| {key} | {value} |" for key, value in rows.items() if value is not None]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines]) if lines else ""


def provenance(checkpoint_dir: Path, base: str, template: str | None, adapter: Path | None = None) -> dict[str, Any]:
    """Return hashes of what an export is made from, of which `base` is the fingerprint of the base's state dict."""
    return {
        "base": base,
        "adapter": sha256(adapter) if adapter else None,
        "tokenizer": Tokenizer(checkpoint_dir).fingerprint if has_tokenizer(checkpoint_dir) else None,
        "template": hashlib.sha256(template.encode()).hexdigest() if template else None,
    }


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of those PACKAGES that are installed."""
    installed = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed
