"""The text of an answer as its tokens come, up to the first of the strings that end it."""

from collections.abc import Iterable, Iterator, Sequence

from lit_gpt.text.tokenizer import TextStream, Tokenizer


class AnswerText:
    """Makes text of tokens that come one by one.

    What may be the beginning of a stop string is held back until it is known; a stop string is no part of the text.

    Attributes:
        ended: whether a stop string has been met.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.stream, self.stops = TextStream(tokenizer), tuple(filter(None, stops))
        self.held, self.ended = "", False

    def push(self, token: int) -> str:
        """Return the text that one more token makes certain, often none."""
        return self._take(self.stream.push(token))

    def rest(self) -> str:
        """Return what was held back, when no token follows."""
        piece = self._take(self.stream.rest())
        piece, self.held = piece + ("" if self.ended else self.held), ""
        return piece

    def _take(self, piece: str) -> str:
        if self.ended or not self.stops:
            return "" if self.ended else piece
        text = self.held + piece
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if places:
            self.ended, self.held = True, ""
            return text[: min(places)]
        keep = max(beginning(text, stop) for stop in self.stops)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def beginning(text: str, stop: str) -> int:
    """Return how many of the text's last characters the stop string begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def answer_text(tokenizer: Tokenizer, ids: Iterable[int], stops: Sequence[str] = ()) -> Iterator[str]:
    """Yield pieces of the text of `ids` up to the first stop string, and take no more tokens from there on."""
    text = AnswerText(tokenizer, stops)
    for token in ids:
        if piece := text.push(token):
            yield piece
        if text.ended:
            return
    if piece := text.rest():
        yield piece
