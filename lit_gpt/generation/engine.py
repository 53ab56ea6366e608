"""The decoder loop, the only one: prompts are read in batches, then each row grows by one token at a time."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lit_gpt.errors import UsageError, UserError
from lit_gpt.generation.sampling import Sampling, sample
from lit_gpt.generation.sequence import Constraint, DecodingRow, DrawingStep, Step, eager_step
from lit_gpt.model.gpt import GPT
from lit_gpt.model.kv_cache import KVCache, PackedPrefillCache, copy_cache, row_view, truncate
from lit_gpt.model.packed_inputs import Segments
from lit_gpt.text.messages import Message, Tools
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.text.tokenizer import Tokenizer

PREFILL_CHUNK = 512  # tokens of a prompt that are read at once, so that a long one needs no more memory than that


@torch.no_grad()
def generate(
    model: GPT,
    prompt: list[int],
    max_new_tokens: int,
    *,
    stop_ids: Iterable[int] = (),
    generator: torch.Generator | None = None,
    cache: KVCache | None = None,
    step: Step | None = None,
    constraint: Constraint | None = None,
    **sampling: Any,
) -> Iterator[int]:
    """Yield token ids that continue `prompt`, one by one, until a stop id (not yielded) or `max_new_tokens`.

    Args:
        prompt: token ids, at least one.
        generator: on the model's device; None: torch's own.
        cache: holds a beginning of the prompt, shorter than it, and has room for the rest and the answer; all that is
            fed is added. None: a new one.
        step: takes the place of the model after the prompt.
        constraint: says which tokens may follow the prompt; None: all.
        sampling: the attributes of `Sampling`, such as temperature.

    Raises:
        UserError: the prompt is empty, or prompt and answer do not fit the model's context.
    """
    if not prompt:
        raise UserError("the prompt holds no tokens; give at least one, such as BOS")
    check_context(model, len(prompt), max_new_tokens)
    if max_new_tokens < 1:
        return
    stops = set(stop_ids)
    cache = cache or model.kv_cache(1, len(prompt) + max_new_tokens)
    row = DecodingRow(list(prompt), max_new_tokens, generator, cache[0].length, sampling=Sampling(**sampling))
    row.constraint = constraint
    for _, token in decode(model, [row], cache, step=step):
        if token in stops:
            return
        yield token


def likeliest_answer(
    model: GPT, prompt: list[int], tokens: int, stop_ids: Iterable[int], step: Step | None = None
) -> list[int]:
    """Return the ids that greedily continue a prompt: at most so many, as the context has room, see `generate`."""
    room = min(tokens, model.config.block_size - len(prompt))
    return list(generate(model, prompt, room, temperature=0, stop_ids=stop_ids, step=step))


def check_context(model: GPT, length: int, max_new_tokens: int) -> None:
    limit = model.config.block_size
    if length + max_new_tokens > limit:
        raise UserError(
            f"the prompt's {length} tokens and --max_new_tokens {max_new_tokens} exceed the model's context of "
            f"{limit}; shorten the prompt or ask for fewer tokens"
        )


def decode(
    model: GPT,
    rows: Iterable[DecodingRow],
    cache: KVCache,
    *,
    step: Step | None = None,
    choose: Callable[[list[DecodingRow]], None] = lambda rows: None,
) -> Iterator[tuple[DecodingRow, int]]:
    """Yield each row with its next token, in turns. A row whose `remaining` is set to 0 ends.

    As many are continued together as the cache has slots; when one ends, the next takes its slot. For the arguments see
    Batch.
    """
    queue, batch = iter(rows), Batch(model, cache, step, choose)
    while True:
        for row in islice(queue, batch.free):
            batch.join(row)
        if not batch.rows:
            return
        yield from batch.advance()


class Batch:
    """Rows that are continued together. Between turns others may join and leave.

    Prompts are packed to be read, so nothing is padded; from then on each row adds a token to its own slot in the
    cache, at its own position. So a row is what it would be alone but for rounding, wherever the others are.

    Args:
        cache: each slot has room for a row's prompt and answer, whichever joins.
        step: takes the place of the model once the prompts are read.
        choose: is told which rows the model is about to compute.
        piece: tokens of prompts that are read in a turn, so that rows that are further need not wait for a long one;
            None: all.
    """

    def __init__(
        self,
        model: GPT,
        cache: KVCache,
        step: Step | None = None,
        choose: Callable[[list[DecodingRow]], None] = lambda rows: None,
        piece: int | None = None,
    ) -> None:
        self.model, self.cache, self.step, self.choose, self.piece = model, cache, step, choose, piece
        n = cache[0].rows
        self.slots = [cache] if n == 1 else [row_view(cache, i) for i in range(n)]
        self.rows: list[DecodingRow] = []  # those whose prompts are read come first; each has the slot of its place
        self.read = 0  # how many these are

    @property
    def free(self) -> int:
        """Return how many rows can join."""
        return len(self.slots) - len(self.rows)

    def join(self, row: DecodingRow) -> None:
        """Continue a row, from the next turn on."""
        slot = self.slots[len(self.rows)]
        truncate(slot, row.cached)
        row.cache = list(slot)  # a list of its own tells a step that another row begins
        self.rows.append(row)

    def leave(self, row: DecodingRow) -> None:
        """Continue a row no more: those that remain move up, so that theirs are the cache's first slots."""
        i = self.rows.index(row)
        if i < self.read:
            self.read -= 1
            self._move(self.read, i)
            i = self.read
        self._move(len(self.rows) - 1, i)
        self.rows.pop()

    def _move(self, source: int, target: int) -> None:
        """Put a row into the place, and its cache into the slot, of another that leaves."""
        if source != target:
            row, left = self.rows[source], self.rows[target]
            copy_cache(row.cache, left.cache)
            row.cache, left.cache = left.cache, row.cache
            self.rows[target], self.rows[source] = row, left

    @torch.no_grad()
    def advance(self) -> Iterator[tuple[DecodingRow, int]]:
        """Take a turn: yield each row whose prompt is read with its next token. Rows that have ended leave."""
        self.read_prompts()
        active = self.rows[: self.read]
        if not active:
            return
        tokens = self.drawn_by_step(active)
        if tokens is None:
            logits = next_logits(self.model, active, self.cache, self.step, self.choose)
            tokens = torch.cat([draw(x, row) for x, row in zip(logits, active, strict=True)]).tolist()
            for row, x, token in zip(active, logits, tokens, strict=True):
                if row.observe:
                    row.observe(x, token)
        for row, token in zip(active, tokens, strict=True):
            if row.constraint:
                row.constraint.take(token)
            row.ids.append(token)
            row.remaining -= 1
            yield row, token
        for row in reversed(active):
            if row.remaining <= 0:
                self.leave(row)

    def drawn_by_step(self, rows: list[DecodingRow]) -> list[int] | None:
        """Return the next tokens, if all of the rows but these is read and the step can draw them; else None."""
        if not isinstance(self.step, DrawingStep):
            return None
        for row in rows:
            if row.constraint or row.observe or row.sampling.repetition_penalty != 1:
                return None
            first, length = row.cache[0], len(row.ids)
            if first.length != length - 1 or self.model.needs_reread(first, length):
                return None
        self.choose(rows)
        return self.step.draw(rows, self.cache)

    def read_prompts(self) -> None:
        """Read on in the prompts, the oldest first; `next_logits` reads the last piece of each."""
        room = self.piece or sum(len(row.ids) for row in self.rows)
        for row in self.rows[self.read :]:
            known = row.cache[0].length
            if len(row.ids) - known > room:
                self.choose([row])
                return read(self.model, row, known + room)
            room -= len(row.ids) - known
            self.read += 1


def draw(logits: Tensor, row: DecodingRow) -> Tensor:
    """Draw a row's next token, int64 (1,), from logits (vocabulary,)."""
    allowed = row.constraint.allow(logits) if row.constraint else logits
    return sample(allowed, row.sampling, row.generator, row.ids)


def next_logits(
    model: GPT,
    rows: list[DecodingRow],
    cache: KVCache,
    step: Step | None,
    choose: Callable[[list[DecodingRow]], None],
) -> Tensor:
    """Return the logits that follow each row, (len(rows), padded_vocab_size)."""
    for batch in prefill_batches(model, rows) if len(rows) > 1 else ():
        choose(batch[:1])
        prefill_packed(model, batch)
    for row in rows:
        if model.needs_reread(row.cache[0], len(row.ids)):
            truncate(row.cache, 0)
        # alone, the last chunk gives the logits; else all rows add one token together
        read_to = len(row.ids) - (PREFILL_CHUNK if len(rows) == 1 else 1)
        if row.cache[0].length < read_to:
            choose([row])
            read(model, row, read_to)
    choose(rows)
    if step and all(row.cache[0].length == len(row.ids) - 1 for row in rows):
        return step(rows, cache)
    return eager_step(model, rows, cache)


def read(model: GPT, row: DecodingRow, end: int) -> None:
    """Read a row's tokens up to the `end`-th, in chunks."""
    while (start := row.cache[0].length) < end:
        chunk = row.ids[start : min(start + PREFILL_CHUNK, end)]
        idx = torch.tensor([chunk], device=model.wte.weight.device)
        model.hidden(idx, cache=row.cache, length=len(row.ids))


def prefill_batches(model: GPT, rows: list[DecodingRow]) -> Iterator[list[DecodingRow]]:
    """Yield batches of rows of which nothing is read yet, each a chunk's tokens at most.

    All rows of a batch are under one LoRA, for what is packed looks like one row.
    """
    batch: list[DecodingRow] = []
    size = 0
    for row in sorted(rows, key=lambda row: row.lora):
        tokens = len(row.ids) - 1
        same_angles = model.rope.is_long(tokens) == model.rope.is_long(tokens + 1)
        if row.cache[0].length or not 0 < tokens <= PREFILL_CHUNK or not same_angles:
            continue
        if batch and (size + tokens > PREFILL_CHUNK or row.lora != batch[0].lora):
            yield batch
            batch, size = [], 0
        batch, size = [*batch, row], size + tokens
    if batch:
        yield batch


def prefill_packed(model: GPT, rows: list[DecodingRow]) -> None:
    """Read all tokens of the rows but the last of each, packed."""
    device, lengths = model.wte.weight.device, [len(row.ids) - 1 for row in rows]
    idx = torch.tensor([[token for row in rows for token in row.ids[:-1]]], device=device)
    cache = [PackedPrefillCache(caches, tuple(lengths)) for caches in zip(*(row.cache for row in rows), strict=True)]
    model.hidden(idx, Segments.of(lengths, device), cache)
    for row in rows:
        row.cache[0].uses_long_rope = model.rope.is_long(len(row.ids))


def new_generator(model: GPT, seed: int) -> torch.Generator:
    """Return a random generator for sampling on the model's device."""
    return torch.Generator(model.wte.weight.device).manual_seed(seed)


def prompt_ids(
    messages: list[Message], model: GPT, tokenizer: Tokenizer, style: PromptStyle, tools: Tools = None
) -> list[int]:
    """Return the token ids up to the answer, at least one; virtual ones come before.

    Raises:
        UserError: there is none, or one that the model does not have; the template refuses the messages.
    """
    ids = style.encode_prompt(messages, tokenizer, tools)
    if not ids:
        raise UsageError(f"the prompt holds no tokens in the prompt style '{style.name}'; give it some text")
    check_ids(model, ids)
    return [*model.virtual_tokens, *ids]


def check_ids(model: GPT, ids: list[int]) -> None:
    """Refuse token ids that the model does not have."""
    if max(ids) >= model.config.padded_vocab_size:
        raise UserError(f"the tokenizer gives the id {max(ids)}, which the model's embedding does not have")
