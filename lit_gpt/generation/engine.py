"""The decoder loop, the only one: prompts are read in batches, then each row grows by one token at a time."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from lit_gpt.errors import UsageError, UserError
from lit_gpt.generation.sequence import Row, Step, eager_step
from lit_gpt.model.gpt import GPT
from lit_gpt.model.inputs import Segments
from lit_gpt.model.kv_cache import KVCache, PackedPrefillCache, copy_cache, row_view, truncate
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
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop_ids: Iterable[int] = (),
    generator: torch.Generator | None = None,
    cache: KVCache | None = None,
    step: Step | None = None,
) -> Iterator[int]:
    """Yield token ids that continue `prompt`, one by one, until a stop id (not yielded) or `max_new_tokens`.

    Args:
        prompt: token ids, at least one.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among this many likeliest tokens only.
        top_p: sample among the likeliest tokens that together have this probability (Holtzman et al. 2020).
        generator: on the model's device; None: torch's own.
        cache: holds a beginning of the prompt, shorter than it, and has room for the rest and the answer; all that is
            fed is added. None: a new one.
        step: takes the place of the model after the prompt.

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
    row = Row(list(prompt), max_new_tokens, generator, cache[0].length)
    for _, token in decode(model, [row], cache, temperature, top_k, top_p, step=step):
        if token in stops:
            return
        yield token


def check_context(model: GPT, length: int, max_new_tokens: int) -> None:
    limit = model.config.block_size
    if length + max_new_tokens > limit:
        raise UserError(
            f"the prompt's {length} tokens and --max_new_tokens {max_new_tokens} exceed the model's context of "
            f"{limit}; shorten the prompt or ask for fewer tokens"
        )


@torch.no_grad()
def decode(
    model: GPT,
    rows: Iterable[Row],
    cache: KVCache,
    temperature: float,
    top_k: int | None,
    top_p: float,
    *,
    step: Step | None = None,
    choose: Callable[[list[Row]], None] = lambda rows: None,
) -> Iterator[tuple[Row, int]]:
    """Yield each row with its next token, in turns.

    As many are continued together as the cache has slots; when one ends, the next takes its slot.

    Prompts are packed to be read, so nothing is padded; from then on each row adds a token to its own slot in the
    cache, at its own position. So a row is what it would be alone but for rounding, wherever the others are.

    Args:
        cache: each slot has room for every row's prompt and answer.
        step: takes the place of the model once the prompts are read.
        choose: is told which rows the model is about to compute.
    """
    queue, n = iter(rows), cache[0].rows
    active: list[Row] = []
    slots = [cache] if n == 1 else [row_view(cache, i) for i in range(n)]
    while True:
        for slot in slots[len(active) :]:
            if (row := next(queue, None)) is None:
                break
            truncate(slot, row.cached)
            row.cache = list(slot)  # a list of its own tells a step that another row begins
            active.append(row)
        if not active:
            return
        logits = next_logits(model, active, cache, step, choose)
        drawn = [sample(x, temperature, top_k, top_p, row.generator) for x, row in zip(logits, active, strict=True)]
        for row, token in zip(active, torch.cat(drawn).tolist(), strict=True):
            row.ids.append(token)
            row.remaining -= 1
            yield row, token
        for i in reversed(range(len(active))):
            if active[i].remaining <= 0:
                compact(active, i)


def next_logits(
    model: GPT,
    rows: list[Row],
    cache: KVCache,
    step: Step | None,
    choose: Callable[[list[Row]], None],
) -> Tensor:
    """Return the logits that follow each row, (len(rows), padded_vocab_size)."""
    device = model.wte.weight.device
    for batch in prefill_batches(model, rows) if len(rows) > 1 else ():
        choose(batch[:1])
        prefill_packed(model, batch)
    for row in rows:
        if model.needs_reread(row.cache[0], len(row.ids)):
            truncate(row.cache, 0)
        # alone, the last chunk gives the logits; else all rows add one token together
        read_to = len(row.ids) - (PREFILL_CHUNK if len(rows) == 1 else 1)
        while (start := row.cache[0].length) < read_to:
            choose([row])
            chunk = row.ids[start : min(start + PREFILL_CHUNK, read_to)]
            model.hidden(torch.tensor([chunk], device=device), cache=row.cache, length=len(row.ids))
    choose(rows)
    if step and all(row.cache[0].length == len(row.ids) - 1 for row in rows):
        return step(rows, cache)
    return eager_step(model, rows, cache)


def prefill_batches(model: GPT, rows: list[Row]) -> Iterator[list[Row]]:
    """Yield batches of rows of which nothing is read yet, each a chunk's tokens at most.

    All rows of a batch are under one LoRA, for what is packed looks like one row.
    """
    batch: list[Row] = []
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


def prefill_packed(model: GPT, rows: list[Row]) -> None:
    """Read all tokens of the rows but the last of each, packed."""
    device, lengths = model.wte.weight.device, [len(row.ids) - 1 for row in rows]
    idx = torch.tensor([[token for row in rows for token in row.ids[:-1]]], device=device)
    cache = [PackedPrefillCache(caches, tuple(lengths)) for caches in zip(*(row.cache for row in rows), strict=True)]
    model.hidden(idx, Segments.of(lengths, device), cache)
    for row in rows:
        row.cache[0].uses_long_rope = model.rope.is_long(len(row.ids))


def compact(rows: list[Row], i: int) -> None:
    """Take out row i, and put the last into its slot, so that those that remain are the cache's first."""
    last = rows.pop()
    if i < len(rows):
        copy_cache(last.cache, rows[i].cache)
        last.cache, rows[i] = rows[i].cache, last


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """Draw one token id, int64 (1,), from logits (vocabulary,)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.numel())).values[-1], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities > top_p  # the likeliest token is never among these
        logits = logits.index_fill(0, order[beyond], -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


def new_generator(model: GPT, seed: int) -> torch.Generator:
    """Return a random generator for sampling on the model's device."""
    return torch.Generator(model.wte.weight.device).manual_seed(seed)


def prompt_ids(
    messages: list[Message], model: GPT, tokenizer: Tokenizer, style: PromptStyle, tools: Tools = None
) -> list[int]:
    """Return the token ids up to the answer, at least one.

    Raises:
        UserError: there is none, or one that the model does not have; the template refuses the messages.
    """
    ids = style.encode_prompt(messages, tokenizer, tools)
    if not ids:
        raise UsageError(f"the prompt holds no tokens in the prompt style '{style.name}'; give it some text")
    if max(ids) >= model.config.padded_vocab_size:
        raise UserError(f"the tokenizer gives the id {max(ids)}, which the model's embedding does not have")
    return ids
