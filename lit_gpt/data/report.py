"""Prints the supervision audit and one marked sample."""

import shlex
from collections import Counter
from pathlib import Path

from lit_gpt.data.audit import Audit
from lit_gpt.data.recipe import recipe
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.text.tokenizer import Tokenizer


def print_audit(
    audits: dict[str, Audit], first: tuple[list[int], list[int]] | None, tokenizer: Tokenizer, style: PromptStyle,
    limit: int,
) -> None:  # fmt: skip
    """Print the supervision audit and the first sample with its supervised part marked."""
    summaries = {name: audit.summary() for name, audit in audits.items()}
    print(f"{'':32}" + "".join(f"{name:>12}" for name in summaries))
    for key in dict.fromkeys(key for summary in summaries.values() for key in summary):
        if key != "rows_dropped":
            counts = (f"{summary.get(key, 0):>12}" for summary in summaries.values())
            print(f"{key.replace('_', ' '):32}" + "".join(counts))
    for reason in sorted({reason for audit in audits.values() for reason in audit.dropped}):
        dropped = (f"{audit.dropped[reason]:>12}" for audit in audits.values())
        print(f"{'rows dropped: ' + reason:32}" + "".join(dropped))
    print(f"\nprompt style {style.name}, at most {limit} tokens a sample. The first, its supervised part in ⟦ ⟧:\n")
    if first:
        print(marked(*first, tokenizer))


def print_unused(unused: Counter[str], plain_rows: int) -> None:
    """Print which fields nothing was taken from, in how many rows, and how many rows are plain text."""
    if plain_rows:
        print(f"{plain_rows} rows hold a text ('text'): learned whole, with the end token, in no prompt style")
    if unused:
        fields = ", ".join(f"'{name}' ({n} rows)" for name, n in unused.most_common(8))
        more = f" and {len(unused) - 8} more" if len(unused) > 8 else ""
        print(f"fields that are not used: {fields}{more}")


def print_next(checkpoint_dir: Path, data_dir: Path, rows: int) -> None:
    """Print the command that trains on what was written, whose training split has so many rows."""
    paths = {"checkpoint_dir": checkpoint_dir, "data_dir": data_dir, "out_dir": Path("out/lora") / data_dir.name}
    folders = " ".join(f"--{flag} {shlex.quote(str(path))}" for flag, path in paths.items())
    print(f"\nwrote {data_dir}; next: python finetune/lora.py {folders} {recipe(rows)}".rstrip())


def marked(ids: list[int], supervised: list[int], tokenizer: Tokenizer) -> str:
    """Return the text of a sample, with its supervised parts in brackets."""
    parts, start = [], 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or supervised[i] != supervised[start]:
            text = tokenizer.decode(ids[start:i], skip_special_tokens=False)
            parts.append(f"⟦{text}⟧" if supervised[start] else text)
            start = i
    return "".join(parts)
