"""Questions whose answers are known: a conversation's tokens up to its last answer, and that answer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lit_gpt.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Question:
    """Holds the tokens up to an answer, their text, and the wanted answer."""

    ids: list[int]
    text: str
    wanted: str
    wanted_tokens: int


def question_of(ids: list[int], supervised: Sequence[int], tokenizer: Tokenizer, stop_ids: Iterable[int]) -> Question:
    """Return the last answer of a sample as a question: what is supervised last is wanted, all before it is read.

    Raises:
        ValueError: nothing comes before the answer, or nothing is supervised.
    """
    end = max((i + 1 for i, learned in enumerate(supervised) if learned), default=0)
    start = end
    while start and supervised[start - 1]:
        start -= 1
    if not start:
        raise ValueError("has no answer after a question; was the data prepared with --mask_inputs false?")
    wanted = [token for token in ids[start:end] if token not in set(stop_ids)]
    return Question(ids[:start], tokenizer.decode(ids[:start]), tokenizer.decode(wanted), end - start)
