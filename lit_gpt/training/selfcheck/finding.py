"""What a check has found, and how a list of that is shown."""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lit_gpt.errors import UserError

WORDS = {True: "ok", False: "FAILED", None: "-"}


@dataclass(frozen=True)
class Finding:
    """What one check has found.

    Attributes:
        name: of the check, one word.
        passed: None where there is nothing to judge.
        says: the claim and what was measured, in a line.
        figures: the numbers and names in it, as JSON shows them; `shown` is text to look at.
    """

    name: str
    passed: bool | None
    says: str
    figures: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """Return a line, and below it what is to be looked at, if there is something."""
        line = f"{WORDS[self.passed]:7}{self.name:11}{self.says}"
        return line + textwrap.indent(f"\n{self.figures['shown']}", " " * 18) if "shown" in self.figures else line


def within(name: str, claim: str, off: float, allowed: float) -> Finding:
    """Return the finding that two things which should be equal are `off`, relative to their norm."""
    says = f"{claim}: off by {off:.1e} (at most {allowed:.0e})"
    return Finding(name, off <= allowed, says, {"off": off, "allowed": allowed})


def print_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Print each finding as it comes, and return all."""
    found = []
    for finding in findings:
        print(finding.text(), flush=True)
        found.append(finding)
    return found


def as_json(findings: list[Finding]) -> dict[str, Any]:
    """Return the findings as an object for JSON."""
    checks = {f.name: {"passed": f.passed, "says": f.says, **f.figures} for f in findings}
    return {"passed": not failures(findings), "checks": checks}


def failures(findings: list[Finding]) -> list[str]:
    """Return the names of the checks that failed."""
    return [finding.name for finding in findings if finding.passed is False]


def require_all(findings: list[Finding]) -> None:
    """Raise UserError if a check failed."""
    if failed := failures(findings):
        raise UserError(f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}; their lines say what")
