"""Turns conversations into samples, several at once, and removes duplicates."""

from array import array
from hashlib import blake2b

from lit_gpt.data import audit as data
from lit_gpt.data import split_writer
from lit_gpt.data.args import PrepareArgs
from lit_gpt.data.conversations import BadRow, Conversation
from lit_gpt.errors import UserError
from lit_gpt.text import supervision
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.text.supervision import Encoded, Rendered
from lit_gpt.text.tokenizer import Tokenizer

BATCH_ROWS, BATCH_CHARACTERS = 256, 1 << 20  # what is tokenized at once


class Tokenization:
    """Makes samples of conversations, several at once, and hands them to the splits."""

    def __init__(self, args: PrepareArgs, tokenizer: Tokenizer, style: PromptStyle, limit: int, rows: int) -> None:
        self.args, self.tokenizer, self.style, self.limit = args, tokenizer, style, limit
        self.seen = Seen(rows) if args.deduplicate else None
        self.batch: list[tuple[Conversation, Rendered, split_writer.SplitWriter, int]] = []
        self.characters = 0

    def add(self, conversation: Conversation, split: split_writer.SplitWriter, times: int = 1) -> None:
        """Render a row, and tokenize those that wait once they are enough.

        Raises:
            BadRow: the template refuses it, unless `skip_bad_rows`.
        """
        where, messages, tools = conversation
        theirs = [message for message in messages if message["role"] == "assistant"]
        if not any(message.get("content", "").strip() or message.get("tool_calls") for message in theirs):
            return split.audit.drop("empty answer", times)
        try:
            rendered = self.style.render_sample(messages, self.tokenizer, tools)
        except UserError as error:
            if not self.args.skip_bad_rows:
                raise BadRow(f"{where}: {error}") from None
            return split.audit.drop("refused by the template", times)
        self.batch.append((conversation, rendered, split, times))
        self.characters += len(rendered.text)
        if len(self.batch) == BATCH_ROWS or self.characters > BATCH_CHARACTERS:
            self.flush()
        return None

    def flush(self) -> None:
        encodings = self.style.encode([rendered.text for _, rendered, _, _ in self.batch], self.tokenizer)
        for (conversation, rendered, split, times), encoding in zip(self.batch, encodings, strict=True):
            encoded = supervision.encode(rendered, encoding, self.tokenizer, self.style.stop_ids)
            sample = self.cut(encoded, split.audit, conversation.where, times)
            if sample and self.seen and not self.seen.add(array("i", sample[0]).tobytes() + bytes(sample[1])):
                split.audit.drop("duplicate", times)
            elif sample:
                split.append(*sample, times)
        self.batch, self.characters = [], 0

    def cut(self, encoded: Encoded, audit: data.Audit, where: str, times: int) -> tuple[list[int], list[bool]] | None:
        """A row's ids and what of them is supervised, cut to the limit; None if that is nothing. What happened enters
        the audit."""
        audit.truncated += times * (len(encoded.ids) > self.limit)
        audit.prompt_mismatch += times * sum(answer.prompt_mismatch for answer in encoded.answers)
        audit.not_verbatim += times * encoded.not_verbatim
        audit.content_dropped += times * encoded.content_dropped
        supervised = encoded.supervised
        if not self.args.mask_inputs:
            untaught = {i for answer in encoded.answers if not answer.train for i in range(answer.start, answer.stop)}
            supervised = [i not in untaught for i in range(len(encoded.ids))]
        ids, supervised = encoded.ids[: self.limit], supervised[: self.limit]
        if not any(supervised[1:]):  # the first token has nothing to be predicted from
            audit.unsupervised += times
            audit.first_unsupervised = audit.first_unsupervised or where
            return audit.drop("no supervised token", times) if self.args.allow_unsupervised else None
        ends = [answer.stop - 1 for answer in encoded.answers if answer.start < answer.stop]
        lost = not ends or ends[-1] >= len(ids) or ids[ends[-1]] not in self.style.stop_ids
        audit.missing_eos += times * lost
        return ids, supervised


class Seen:
    """What has been seen, by hashes of 64 bits in one array, at 11 bytes for each that there is room for. Among ten
    million samples, the chance that two different ones share a hash is three in a million."""

    def __init__(self, room: int) -> None:
        self.slots = array("Q", bytes(8)) * (room * 7 // 5 + 1)

    def add(self, sample: bytes) -> bool:
        """Whether it is new."""
        digest = int.from_bytes(blake2b(sample, digest_size=8).digest()) or 1
        i = digest % len(self.slots)
        while self.slots[i] not in (0, digest):
            i = (i + 1) % len(self.slots)
        new = not self.slots[i]
        self.slots[i] = digest
        return new
