"""The gate that an export passes before it is put in place: read back, it must answer the prompts as its source does.

It is read by another's code where that is installed (transformers, PEFT), else by this project's own reader. Compared
are the logits, the tokens of the reference texts, and the tokens of conversations in the chat template.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_gpt.conversion import logits as verify
from lit_gpt.conversion.readers import LitReader, Reader
from lit_gpt.conversion.reference_prompts import CONVERSATIONS, LENGTH, TEXTS
from lit_gpt.errors import UserError
from lit_gpt.model.gpt import GPT
from lit_gpt.text.prompt_style import common_prefix

SAME_SUMS = verify.TOLERANCE[torch.float32], "that the order of sums in float32 explains"


@dataclass
class Reference:
    """What the source answers, computed before the export is read, so that its model need not stay."""

    idx: Tensor  # int64 (rows, LENGTH)
    logits: Tensor  # float32 (rows, LENGTH, padded_vocab_size)
    ids: list[list[int] | None]  # those of TEXTS
    prompts: list[list[int] | None]  # those of CONVERSATIONS
    stops: set[int] | None

    @classmethod
    def compute(cls, source: LitReader, longest: int = LENGTH) -> "Reference":
        """Compute the answers of a source, with logits on at most `longest` tokens of each prompt."""
        ids, prompts = [source.ids(text) for text in TEXTS], [source.prompt(c) for c in CONVERSATIONS]
        assert isinstance(source.model, GPT), "models of transformers are read, but never the source"
        config = source.model.config
        vocabulary, length = config.vocab_size, min(longest, config.block_size - len(source.model.virtual_tokens))
        generator = torch.Generator().manual_seed(0)
        rows = []
        for known in (*ids, *prompts):
            random = torch.randint(vocabulary, (length,), generator=generator)  # where there are no tokens, any will do
            rows.append(torch.cat([torch.tensor(known or [], dtype=torch.int64), random])[:length])
        return cls(idx := torch.stack(rows), source.logits(idx), ids, prompts, source.stops())

    def compare(
        self,
        reader: Reader,
        what: str,
        allowed: float = SAME_SUMS[0],
        why: str = SAME_SUMS[1],
        base: Tensor | None = None,
        mend: str = "",
    ) -> dict[str, Any]:
        """Return the figures of the comparison with what a reader made of an export.

        Args:
            allowed: how far the logits may be off, relative to their norm; `why` names the cause.
            base: logits without the finetune, where it is to be seen that all of it arrived.
            mend: what to do if it did not, for the error.

        Raises:
            UserError: something differs.
        """
        read = f"{what}, read back by {reader.name}"
        for text, ids in zip(TEXTS, self.ids, strict=True):
            if (theirs := reader.ids(text)) != ids:
                raise UserError(f"{read}: the tokens of {text!r} differ: {shown(theirs, ids)}; nothing was written")
        for conversation, ids in zip(CONVERSATIONS, self.prompts, strict=True):
            if ids is not None and (theirs := reader.prompt(conversation)) != ids:
                raise UserError(
                    f"{read}: the chat template renders other tokens: {shown(theirs, ids)}; nothing was written"
                )
        if self.stops and (stops := reader.stops()) is not None and not self.stops <= stops:
            raise UserError(f"{read}: answers end at {sorted(stops)} for {sorted(self.stops)}; nothing was written")
        logits = reader.logits(self.idx).float()
        off = verify.require_within(logits, self.logits, allowed, why, read)
        kept = {}
        if base is not None:
            kept["finetune_arrived"] = verify.check_finetune_kept(logits, self.logits, base, read, mend)
        return {
            "reader": reader.name,
            "logits_difference": off,
            "logits_difference_allowed": allowed,
            **kept,
            "texts_compared": sum(ids is not None for ids in self.ids),
            "conversations_compared": sum(ids is not None for ids in self.prompts),
        }


def shown(actual: list[int] | None, expected: list[int] | None) -> str:
    """Return in words how two lists of ids differ."""
    if actual is None or expected is None:
        return "there are none" if actual is None else f"{len(actual)} where the source has none"
    at = common_prefix(actual, expected)
    if at == min(len(actual), len(expected)):
        return f"{len(actual)} for {len(expected)}"
    return f"token {at + 1} is {actual[at]} for {expected[at]}"
