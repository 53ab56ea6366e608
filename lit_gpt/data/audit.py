"""Counts what became of the rows."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lit_gpt.data.args import PrepareArgs
from lit_gpt.data.tokenization import DUPLICATE, EMPTY, KEPT, REFUSED, UNSUPERVISED

REASONS = {
    EMPTY: "empty answer",
    REFUSED: "refused by the template",
    UNSUPERVISED: "no supervised token",
    DUPLICATE: "duplicate",
}


@dataclass
class Audit:
    """Counts what became of the rows: nothing is dropped or cut without being counted here."""

    dropped: Counter[str] = field(default_factory=Counter)  # reason: rows
    lengths: Counter[int] = field(default_factory=Counter)  # tokens: kept rows of so many
    supervised: int = 0  # tokens
    truncated: int = 0  # rows cut to max_seq_length
    missing_eos: int = 0  # rows whose answer lost its end token, or never had one
    prompt_mismatch: int = 0  # answers that do not follow the tokens which generation would see before them
    not_verbatim: int = 0  # answers that the template does not show in full, and which are not learned
    content_dropped: int = 0  # rows of which the template leaves another message or a tool out
    unsupervised: int = 0  # rows in which no token is supervised
    unsupervised_cut: int = 0  # those of them that were cut before an answer which the template does show
    empty_answers: int = 0  # answers without content among others, which are not learned
    special_tokens: int = 0  # special tokens that messages write out
    nulls: int = 0  # null fields of calls and schemas, left out

    @classmethod
    def of_rows(cls, records: np.ndarray, lengths: np.ndarray, times: np.ndarray, args: PrepareArgs) -> "Audit":
        """Count the rows of a split.

        Args:
            records: those of all rows, tokenization.RECORD (rows,).
            lengths: how many tokens each row has, int64 (rows,).
            times: how often the split takes each row, int8 (rows,).
        """
        times, status = times.astype(np.int64), records["status"]
        dropped = {
            reason: int(times[status == code].sum())
            for code, reason in REASONS.items()
            if code != UNSUPERVISED or args.allow_unsupervised
        }
        kept = times * (status == KEPT)
        cut = (status == UNSUPERVISED) & (records["truncated"] > 0) & (records["not_verbatim"] == 0)
        sizes, rows = np.unique(np.repeat(lengths, kept), return_counts=True)
        names = (
            "truncated", "missing_eos", "prompt_mismatch", "not_verbatim", "content_dropped", "empty_answers",
            "special_tokens", "nulls",
        )  # fmt: skip
        return cls(
            dropped=Counter({reason: n for reason, n in dropped.items() if n}),
            lengths=Counter(dict(zip(sizes.tolist(), rows.tolist(), strict=True))),
            supervised=int((kept * records["supervised"]).sum()),
            unsupervised=int(times[status == UNSUPERVISED].sum()),
            unsupervised_cut=int(times[cut].sum()),
            **{name: int((times * records[name].astype(np.int64)).sum()) for name in names},
        )

    def summary(self) -> dict[str, Any]:
        """Return the figures for data.json and the printed table."""
        lengths, rows = sorted(self.lengths), self.lengths.total()
        tokens = sum(length * n for length, n in self.lengths.items())
        seldom = {
            "empty_answers_not_learned": self.empty_answers,
            "special_tokens_in_messages": self.special_tokens,
            "null_fields_left_out": self.nulls,
        }
        return {
            "rows_kept": rows,
            "rows_dropped": dict(self.dropped),
            "tokens": tokens,
            "tokens_supervised": self.supervised,
            "length_mean": round(tokens / rows, 1) if rows else 0,
            "length_median": self.median(),
            "length_max": lengths[-1] if lengths else 0,
            "rows_truncated": self.truncated,
            "rows_without_end_token": self.missing_eos,
            "answers_after_another_prompt": self.prompt_mismatch,
            "answers_not_shown_in_full": self.not_verbatim,
            "rows_not_shown_in_full": self.content_dropped,
            "rows_without_supervised_token": self.unsupervised,
            **{name: n for name, n in seldom.items() if n},
        }

    def median(self) -> float:
        """Return the median of the lengths; between two, their mean."""
        if not self.lengths:
            return 0
        lengths, rows = np.array(sorted(self.lengths)), self.lengths.total()
        ends = np.cumsum([self.lengths[length] for length in lengths])
        low, high = lengths[np.searchsorted(ends, [rows / 2, rows // 2 + 1])].tolist()
        return low if low == high else (low + high) / 2
