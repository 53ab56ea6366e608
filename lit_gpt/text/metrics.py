"""Metrics of answers: each scores one answer against the wanted one, from 0 to 1. Nothing here imports torch."""

import json
import re
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_gpt.cli import NonNegativeFloat
from lit_gpt.errors import UsageError, UserError

Metric = Callable[[str, str, str], dict[str, float]]  # question, wanted and given answer -> {name: score}
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class MetricArgs:
    """Metrics"""

    metric: str = "exact"  # Score by exact, contains, regex, json, number or my.py:function; several with commas.
    pattern: str = ""  # Compare what this regular expression finds, its group if it has one (regex).
    fields: str = ""  # Compare these fields, with commas between (json; empty: all of the wanted answer).
    tolerance: NonNegativeFloat = 0.0  # Admit numbers this far off, as a share of the wanted one (number, json).

    def metrics(self) -> dict[str, Metric]:
        """Return the metrics by name. Raises UsageError: one is not known, or lacks what it needs."""
        return {name: self._metric(name) for name in map(str.strip, self.metric.split(","))}

    def _metric(self, name: str) -> Metric:
        if name == "exact":
            return lambda _, wanted, answer: {name: float(answer.strip() == wanted.strip())}
        if name == "contains":
            return lambda _, wanted, answer: {name: float(wanted.strip() in answer)}
        if name == "number":
            return lambda _, wanted, answer: {
                name: float(close(last_number(wanted), last_number(answer), self.tolerance))
            }
        if name == "json":
            fields = [field.strip() for field in self.fields.split(",") if field.strip()]
            return lambda _, wanted, answer: score_fields(wanted, answer, fields, self.tolerance)
        if name == "regex":
            found = finder(self.pattern)
            return lambda _, wanted, answer: {name: float(found(answer) is not None and found(answer) == found(wanted))}
        if ":" in name:
            return own_metric(name)
        known = "exact, contains, regex, json, number or FILE.py:FUNCTION"
        raise UsageError(f"--metric {name}: expected {known}, several with commas between")


def finder(pattern: str) -> Callable[[str], str | None]:
    """Return what finds the first match of a regular expression in a text, or its group if it has one."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--pattern {pattern}: not a regular expression: {error}") from None
    if not pattern:
        raise UsageError("--metric regex: needs --pattern, such as --pattern 'Answer: (.*)'")

    def find(text: str) -> str | None:
        match = compiled.search(text)
        return match and match[1 if compiled.groups else 0]

    return find


def last_number(text: str) -> float | None:
    """Return the last number in a text, thousands with commas or without; None: it has none."""
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def close(wanted: Any, given: Any, tolerance: float) -> bool:
    """Return whether two values are equal, numbers up to `tolerance` times the wanted one."""
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in (wanted, given)):
        return wanted is not None and type(wanted) is type(given) and wanted == given
    return abs(given - wanted) <= tolerance * abs(wanted)


def score_fields(wanted: str, answer: str, fields: list[str], tolerance: float) -> dict[str, float]:
    """Return the share of a JSON object's fields that an answer has right, and for each whether it has.

    Raises:
        UserError: the wanted answer is no JSON object, or lacks a field that is asked for.
    """
    right, given = read_object(wanted), read_object(answer) or {}
    if right is None:
        raise UserError(f"--metric json: a wanted answer is no JSON object: {wanted.strip()[:80]!r}")
    if missing := [field for field in fields if field not in right]:
        raise UserError(f"--fields {missing[0]}: a wanted answer has {', '.join(right) or 'no fields'}")
    names = fields or list(right)
    scores = {name: float(name in given and same(right[name], given[name], tolerance)) for name in names}
    share = sum(scores.values()) / len(scores) if scores else float(given == right)
    return {"json": share} | {f"json.{name}": score for name, score in scores.items()}


def same(wanted: Any, given: Any, tolerance: float) -> bool:
    return wanted is given is None or close(wanted, given, tolerance)


def read_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object in a text, with whatever stands around it; None: there is none."""
    try:
        value = json.loads(text[text.index("{") : text.rindex("}") + 1])
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def own_metric(name: str) -> Metric:
    """Return the metric FILE.py:FUNCTION, a function of question, wanted answer and answer that returns a number."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"--metric {name}: no such file {path}")
    try:
        score = runpy.run_path(path).get(function)
    except Exception as error:  # whatever the user's file does
        raise UserError(f"--metric {name}: {path} fails: {type(error).__name__}: {error}") from None
    if not callable(score):
        raise UserError(f"--metric {name}: {path} has no function {function}")

    def metric(question: str, wanted: str, answer: str) -> dict[str, float]:
        try:
            return {function: float(score(question, wanted, answer))}
        except Exception as error:  # whatever the user's function does
            raise UserError(
                f"--metric {name}: {type(error).__name__}: {error}; expected a function of question, wanted answer and "
                "answer that returns a number or a truth"
            ) from None

    return metric
