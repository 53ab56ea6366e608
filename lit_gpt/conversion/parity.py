"""The gate that an export passes before it is put in place: read back, it must answer the golden prompts as its source.

Read by another's code where that is installed (transformers, PEFT), else by this project's own reader. Compared are the
logits, the tokens of the golden texts, and the tokens of conversations in the chat template.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_gpt.conversion import logits as verify
from lit_gpt.conversion.readers import LitReader, Reader
from lit_gpt.conversion.reference_prompts import CONVERSATIONS, LENGTH, TEXTS
from lit_gpt.errors import UserError
from lit_gpt.text.prompt_style import common_prefix

SAME = verify.TOLERANCE[torch.float32], "that the order of sums in float32 explains"


@dataclass
class Reference:
    """What the source answers. Computed before the export is read, so that its model need not stay."""

    idx: Tensor  # int64 (rows, LENGTH)
    logits: Tensor  # float32 (rows, LENGTH, padded_vocab_size)
    ids: list[list[int] | None]  # of TEXTS
    prompts: list[list[int] | None]  # of CONVERSATIONS
    stops: set[int] | None

    @classmethod
    def of(cls, source: LitReader, longest: int = LENGTH) -> "Reference":
        ids, prompts = [source.ids(text) for text in TEXTS], [source.prompt(c) for c in CONVERSATIONS]
        config = source.model.config
        vocabulary, length = config.vocab_size, min(longest, config.block_size)
        generator = torch.Generator().manual_seed(0)
        rows = []
        for known in (*ids, *prompts):
            random = torch.randint(vocabulary, (length,), generator=generator)  # where there are no tokens, any will do
            rows.append(torch.cat([torch.tensor(known or [], dtype=torch.int64), random])[:length])
        return cls(idx := torch.stack(rows), source.logits(idx), ids, prompts, source.stops())

    def compare(
        self, found: Reader, what: str, allowed: float = SAME[0], why: str = SAME[1], base: Tensor | None = None
    ) -> dict[str, Any]:
        """The figures of the comparison.

        Args:
            allowed: how far the logits may be off, relative to their norm; `why` names the cause.
            base: logits without the finetune, where it is to be seen that all of it arrived.

        Raises:
            UserError: something differs.
        """
        read = f"{what}, read back by {found.name}"
        for text, ids in zip(TEXTS, self.ids, strict=True):
            if found.ids(text) != ids:
                raise UserError(
                    f"{read}: the tokens of {text!r} differ: {shown(found.ids(text), ids)}; nothing was written"
                )
        for conversation, ids in zip(CONVERSATIONS, self.prompts, strict=True):
            if ids is not None and (theirs := found.prompt(conversation)) != ids:
                raise UserError(
                    f"{read}: the chat template renders other tokens: {shown(theirs, ids)}; nothing was written"
                )
        if self.stops and (stops := found.stops()) is not None and not self.stops <= stops:
            raise UserError(f"{read}: answers end at {sorted(stops)} for {sorted(self.stops)}; nothing was written")
        logits = found.logits(self.idx).float()
        off = verify.require_within(logits, self.logits, allowed, why, read)
        arrived = (
            {} if base is None else {"finetune_arrived": verify.check_finetune_kept(logits, self.logits, base, read)}
        )
        return {
            "reader": found.name,
            "logits_difference": off,
            "logits_difference_allowed": allowed,
            **arrived,
            "texts_compared": sum(ids is not None for ids in self.ids),
            "conversations_compared": sum(ids is not None for ids in self.prompts),
        }


def shown(found: list[int] | None, expected: list[int] | None) -> str:
    if found is None or expected is None:
        return "there are none" if found is None else f"{len(found)} where the source has none"
    at = common_prefix(found, expected)
    if at == min(len(found), len(expected)):
        return f"{len(found)} for {len(expected)}"
    return f"token {at + 1} is {found[at]} for {expected[at]}"
