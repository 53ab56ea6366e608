"""Turns conversations into samples, several at once, and records what became of each row."""

import json
import struct
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from lit_gpt.data.args import PrepareArgs
from lit_gpt.data.conversations import Conversation
from lit_gpt.data.split_writer import SampleStore
from lit_gpt.errors import UserError
from lit_gpt.text import supervision
from lit_gpt.text.messages import is_empty, texts
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.text.supervision import Encoded, Rendered
from lit_gpt.text.tokenizer import Tokenizer

MOST = 2**16 - 1  # that a row's record can count of something
BATCH_ROWS, BATCH_CHARACTERS = 256, 1 << 20  # what is tokenized at once
KEPT, EMPTY, REFUSED, UNSUPERVISED, DUPLICATE = range(5)  # what becomes of a row
# A row's record: its status and what the audit counts, 30 bytes. Memory grows with rows by this and their offsets only.
FIELDS = {
    "status": "u1", "truncated": "u1", "content_dropped": "u1", "missing_eos": "u1",
    "prompt_mismatch": "<i4", "not_verbatim": "<i4", "supervised": "<i4", "digest": "<u8",
    "empty_answers": "<u2", "special_tokens": "<u2", "nulls": "<u2",
}  # fmt: skip
RECORD, PACKED = np.dtype(list(FIELDS.items())), struct.Struct("<BBBBiiiQHHH")


@dataclass
class Waiting:
    """A row that is to be tokenized, in its style; what cannot be rendered has a status other than KEPT."""

    where: str
    style: PromptStyle
    rendered: Rendered | None
    status: int
    counts: dict[str, int]


class Tokenization:
    """Makes samples of conversations, several at once. Row i of `store` and of `records` is the i-th added."""

    def __init__(
        self, args: PrepareArgs, tokenizer: Tokenizer, style: PromptStyle, limit: int, folder: Path, store: SampleStore
    ) -> None:
        self.args, self.tokenizer, self.style, self.limit, self.store = args, tokenizer, style, limit, store
        self.packed = bytearray()
        self.notes = open(folder / "rows.notes", "w+")  # noqa: SIM115
        self.batch: list[Waiting] = []
        self.characters = self.plain_rows = 0
        self.plain = PromptStyle.from_name("plain", tokenizer)
        self.unused: Counter[str] = Counter()  # fields from which nothing is taken: in so many rows

    def add(self, conversation: Conversation) -> None:
        """Render a row, and tokenize those that wait once they are enough."""
        where, messages, style = conversation.where, conversation.messages, self.style
        self.unused.update(conversation.unused)
        if conversation.plain:
            style, self.plain_rows = self.plain, self.plain_rows + 1
        rendered, status = None, EMPTY
        if any(message["role"] == "assistant" and not is_empty(message) for message in messages):
            try:
                rendered, status = style.render_sample(messages, self.tokenizer, conversation.tools), KEPT
            except UserError as error:
                where, status = f"{where}: {error}", REFUSED
        special = sum(len(self.tokenizer.special_tokens.findall(text)) for text in texts(messages))
        counts = {
            "empty_answers": conversation.empty_answers,
            "nulls": min(conversation.nulls, MOST),
            "special_tokens": min(special, MOST),
        }
        self.batch.append(Waiting(where, style, rendered, status, counts))
        self.characters += len(rendered.text) if rendered else 0
        if len(self.batch) == BATCH_ROWS or self.characters > BATCH_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        """Tokenize and store the rows that wait."""
        encodings = {}
        for style in {waiting.style for waiting in self.batch}:
            own = [waiting.rendered.text for waiting in self.batch if waiting.rendered and waiting.style == style]
            encodings[style] = style.encode(own, self.tokenizer)
        for waiting in self.batch:
            if waiting.rendered:
                encoding, stops = next(encodings[waiting.style]), waiting.style.stop_ids
                self.record(supervision.encode(waiting.rendered, encoding, self.tokenizer, stops), waiting)
            else:
                self.keep(waiting.where, [], [], waiting.status)
        self.batch, self.characters = [], 0

    def record(self, encoded: Encoded, waiting: Waiting) -> None:
        """Store a row's ids and what of them is supervised, cut to the limit."""
        supervised = encoded.supervised
        if not self.args.mask_inputs:
            masked = {i for answer in encoded.answers if not answer.train for i in range(answer.start, answer.stop)}
            supervised = [i not in masked for i in range(len(encoded.ids))]
        ids, supervised = encoded.ids[: self.limit], supervised[: self.limit]
        counts = waiting.counts | {
            "truncated": len(encoded.ids) > self.limit,
            "content_dropped": encoded.content_dropped,
            "prompt_mismatch": sum(answer.prompt_mismatch for answer in encoded.answers),
            "not_verbatim": encoded.not_verbatim,
        }
        if not any(supervised[1:]):  # the first token has nothing to be predicted from
            return self.keep(waiting.where, [], [], UNSUPERVISED, **counts)
        ends = [answer.stop - 1 for answer in encoded.answers if answer.start < answer.stop]
        missing = not ends or ends[-1] >= len(ids) or ids[ends[-1]] not in waiting.style.stop_ids
        return self.keep(waiting.where, ids, supervised, KEPT, missing_eos=missing, **counts)

    def keep(self, where: str, ids: list[int], supervised: list[bool], status: int, **counts: int) -> None:
        """Store the next row's sample and its record, in which `counts` are the fields of FIELDS by their names."""
        digest = 0
        if ids:  # of ten million, two different ones share 64 bits with a chance of 3e-6
            sample = array("i", ids).tobytes() + bytes(supervised)
            digest = int.from_bytes(blake2b(sample, digest_size=8).digest())
        if status in (REFUSED, UNSUPERVISED):
            self.notes.write(json.dumps([len(self.packed) // PACKED.size, status, where]) + "\n")
        counts |= {"status": status, "supervised": sum(supervised[1:]), "digest": digest}
        self.packed += PACKED.pack(*(counts.get(name, 0) for name in FIELDS))
        self.store.append(ids, supervised)

    def records(self) -> np.ndarray:
        """Return the records of all rows, RECORD (rows,)."""
        return np.frombuffer(self.packed, RECORD).copy()

    def style_of_rows(self) -> PromptStyle:
        """Return the style that goes with the data: plain where none was asked for and all rows are texts."""
        texts_alone = self.plain_rows * PACKED.size == len(self.packed)
        return self.plain if texts_alone and self.args.prompt_style == "auto" else self.style

    def noted(self, status: int) -> Iterator[tuple[int, str]]:
        """Yield the rows of a status, in their order, each with its place and what was wrong."""
        self.notes.seek(0)
        for line in self.notes:
            row, row_status, where = json.loads(line)
            if row_status == status:
                yield row, where

    def remove(self) -> None:
        """Remove the temporary file of notes."""
        self.notes.close()
        Path(self.notes.name).unlink()
