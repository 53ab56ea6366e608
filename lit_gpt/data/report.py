"""Prints the supervision audit and one marked sample."""

from lit_gpt.data.audit import Audit
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.text.tokenizer import Tokenizer


def print_audit(
    audits: dict[str, Audit], first: tuple[list[int], list[int]] | None, tokenizer: Tokenizer, style: PromptStyle,
    limit: int,
) -> None:  # fmt: skip
    """Print the supervision audit and the first sample with its supervised part marked."""
    summaries = {name: audit.summary() for name, audit in audits.items()}
    print(f"{'':32}" + "".join(f"{name:>12}" for name in summaries))
    for key in next(iter(summaries.values())):
        if key != "rows_dropped":
            print(f"{key.replace('_', ' '):32}" + "".join(f"{summary[key]:>12}" for summary in summaries.values()))
    for reason in sorted({reason for audit in audits.values() for reason in audit.dropped}):
        counts = (audit.dropped[reason] for audit in audits.values())
        print(f"{'rows dropped: ' + reason:32}" + "".join(f"{count:>12}" for count in counts))
    print(f"\nprompt style {style.name}, at most {limit} tokens a row. The first row, its supervised part in ⟦ ⟧:\n")
    if first:
        print(marked(*first, tokenizer))


def marked(ids: list[int], supervised: list[int], tokenizer: Tokenizer) -> str:
    """Return the text of a sample, with its supervised parts in brackets."""
    parts, start = [], 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or supervised[i] != supervised[start]:
            text = tokenizer.decode(ids[start:i], skip_special_tokens=False)
            parts.append(f"⟦{text}⟧" if supervised[start] else text)
            start = i
    return "".join(parts)
