"""Generating text: the one decoder loop, and what the generate scripts share around it."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_gpt.attention import Segments
from lit_gpt.checkpoint import DTYPES
from lit_gpt.decoding import FastStep, Row, Step, one_more
from lit_gpt.errors import UsageError, UserError
from lit_gpt.memory import peak_memory_bytes
from lit_gpt.model import GPT, KVCache, Several, forget, move, of_row
from lit_gpt.prompts import Message, PromptStyle, Tools, instruction_messages
from lit_gpt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lit_gpt.loras import LoRAs
    from lit_gpt.prompt_file import PromptFile

PIECE = 512  # tokens of a prompt that are read at once, so that a long one needs no more memory than that


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
    """Token ids that continue `prompt`, one by one, until a stop id (not yielded) or `max_new_tokens`.

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
        UserError: prompt and answer do not fit the model's context.
    """
    check_room(model, len(prompt), max_new_tokens)
    if max_new_tokens < 1:
        return
    stops = set(stop_ids)
    cache = cache or model.kv_cache(1, len(prompt) + max_new_tokens)
    row = Row(list(prompt), max_new_tokens, generator, cache[0].length)
    for _, token in decode(model, [row], cache, temperature, top_k, top_p, step=step):
        if token in stops:
            return
        yield token


def check_room(model: GPT, length: int, max_new_tokens: int) -> None:
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
    """Each row with its next token, in turns. As many are continued together as the cache has places; when one ends,
    the next takes its place.

    Prompts are packed to be read, so nothing is padded; from then on each row adds a token to its own place in the
    cache, at its own position. So a row is what it would be alone but for rounding, wherever the others are.

    Args:
        cache: each place has room for every row's prompt and answer.
        step: takes the place of the model once the prompts are read.
        choose: is told which rows the model is about to compute.
    """
    waiting, going, n = iter(rows), [], len(cache[0].k)
    places = [cache] if n == 1 else [of_row(cache, i) for i in range(n)]
    while True:
        for place in places[len(going) :]:
            if (row := next(waiting, None)) is None:
                break
            forget(place, row.cached)
            row.cache = list(place)  # a list of its own tells a step that another row begins
            going.append(row)
        if not going:
            return
        logits = next_logits(model, going, cache, step, choose)
        drawn = [sample(x, temperature, top_k, top_p, row.generator) for x, row in zip(logits, going, strict=True)]
        for row, token in zip(going, torch.cat(drawn).tolist(), strict=True):
            row.ids.append(token)
            row.room -= 1
            yield row, token
        for i in reversed(range(len(going))):
            if going[i].room <= 0:
                close_up(going, i)


def next_logits(
    model: GPT,
    rows: list[Row],
    cache: KVCache,
    step: Step | None,
    choose: Callable[[list[Row]], None],
) -> Tensor:
    """The logits that follow each row, (len(rows), padded_vocab_size)."""
    device = model.wte.weight.device
    for pack in packs(model, rows) if len(rows) > 1 else ():
        choose(pack[:1])
        read_together(model, pack)
    for row in rows:
        if model.outdated(row.cache, len(row.ids)):
            forget(row.cache, 0)
        # alone, the last piece gives the logits; else all rows add one token together
        read_to = len(row.ids) - (PIECE if len(rows) == 1 else 1)
        while (start := row.cache[0].length) < read_to:
            choose([row])
            piece = row.ids[start : min(start + PIECE, read_to)]
            model.hidden(torch.tensor([piece], device=device), cache=row.cache, length=len(row.ids))
    choose(rows)
    if step and all(row.cache[0].length == len(row.ids) - 1 for row in rows):
        return step(rows, cache)
    return one_more(model, rows, cache)


def packs(model: GPT, rows: list[Row]) -> Iterator[list[Row]]:
    """Rows that nothing is read of, a piece's tokens at most; under one LoRA, for what is packed looks like one row."""
    pack, size = [], 0
    for row in sorted(rows, key=lambda row: row.lora):
        tokens = len(row.ids) - 1
        same_angles = model.rope.is_long(tokens) == model.rope.is_long(tokens + 1)
        if row.cache[0].length or not 0 < tokens <= PIECE or not same_angles:
            continue
        if pack and (size + tokens > PIECE or row.lora != pack[0].lora):
            yield pack
            pack, size = [], 0
        pack, size = [*pack, row], size + tokens
    if pack:
        yield pack


def read_together(model: GPT, rows: list[Row]) -> None:
    """All tokens of the rows but the last of each, packed."""
    device, lengths = model.wte.weight.device, [len(row.ids) - 1 for row in rows]
    idx = torch.tensor([[token for row in rows for token in row.ids[:-1]]], device=device)
    cache = [Several(caches, tuple(lengths)) for caches in zip(*(row.cache for row in rows), strict=True)]
    model.hidden(idx, Segments.of(lengths, device), cache)
    for row in rows:
        row.cache[0].long = model.rope.is_long(len(row.ids))


def close_up(rows: list[Row], i: int) -> None:
    """Take out row i, and put the last into its place, so that those that remain are the cache's first."""
    last = rows.pop()
    if i < len(rows):
        move(last.cache, rows[i].cache)
        last.cache, rows[i] = rows[i].cache, last


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """One token id, int64 (1,), from logits (vocabulary,)."""
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


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_of(hp: SimpleNamespace) -> torch.dtype:
    return DTYPES[hp.precision]


def read_prompt(hp: SimpleNamespace) -> "str | PromptFile":
    """The prompt from --prompt, or from --prompt_file ("-": standard input); with --out, the prompts of that file."""
    if bool(hp.prompt) == bool(hp.prompt_file):
        raise UsageError("--prompt: expected a prompt, either by --prompt or by --prompt_file (- is standard input)")
    if hp.out:
        from lit_gpt.prompt_file import PromptFile

        return PromptFile.read(hp)
    if hp.prompt:
        text = hp.prompt
    elif hp.prompt_file.suffix == ".jsonl":
        raise UsageError(f"--prompt_file {hp.prompt_file}: holds a prompt on each line; add --out FILE for the answers")
    else:
        try:
            on_stdin = str(hp.prompt_file) == "-"
            text = sys.stdin.read() if on_stdin else hp.prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt_file {hp.prompt_file}: cannot be read ({error})") from None
    if not text:
        raise UsageError("--prompt_file: is empty")
    return text


def lora_paths(prompt: "str | PromptFile") -> list[Path | None]:
    """LoRA files that lines of a prompt file name, and None if there are lines that name none."""
    return [] if isinstance(prompt, str) else prompt.lora_paths


def sampling_options(hp: SimpleNamespace, model: GPT) -> dict[str, Any]:
    """The options of `generate` that a script's flags set, besides the step."""
    generator = torch.Generator(model.wte.weight.device).manual_seed(hp.seed)
    return {"temperature": hp.temperature, "top_k": hp.top_k, "top_p": hp.top_p, "generator": generator}


def new_step(hp: SimpleNamespace, model: GPT) -> Step:
    """What takes the model's place for one more token of each row."""
    return FastStep(model, hp.compile)


def prompt_ids(
    messages: list[Message], model: GPT, tokenizer: Tokenizer, style: PromptStyle, tools: Tools = None
) -> list[int]:
    """Token ids up to the answer, at least one.

    Raises:
        UserError: there is none, or one that the model does not have; the template refuses the messages.
    """
    ids = style.encode_prompt(messages, tokenizer, tools)
    if not ids:
        raise UsageError("the prompt holds no tokens")
    if max(ids) >= model.config.padded_vocab_size:
        raise UserError(f"the tokenizer gives the id {max(ids)}, which the model's embedding does not have")
    return ids


def answer(
    hp: SimpleNamespace,
    prompt: "str | PromptFile",
    model: GPT,
    tokenizer: Tokenizer,
    style: PromptStyle,
    loras: "LoRAs | None" = None,
) -> None:
    """Print `num_samples` answers to the prompt as they come: the text on stdout, figures on stderr. Or answer a
    file."""
    if not isinstance(prompt, str):
        return prompt.answer(hp, model, tokenizer, style, loras)
    ids = prompt_ids(instruction_messages(prompt, hp.input), model, tokenizer, style)
    check_room(model, len(ids), hp.max_new_tokens)
    cache = model.kv_cache(1, len(ids) + hp.max_new_tokens)
    options = sampling_options(hp, model) | {"step": new_step(hp, model), "cache": cache}
    for _ in range(hp.num_samples):
        forget(cache, len(ids) - 1)
        clock = Clock()
        new = generate(model, ids, hp.max_new_tokens, stop_ids=style.stop_ids, **options)
        try:
            for piece in tokenizer.decode_stream(clock.watch(new)):
                print(piece, end="", flush=True)
        finally:
            print(flush=True)
        print(f"[prompt {len(ids)} tokens, {clock.report()}]", file=sys.stderr)


class Clock:
    """Times a stream of tokens: how long until the first, how fast from then on."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.times: list[float] = []

    def watch(self, ids: Iterable[int]) -> Iterator[int]:
        for token in ids:
            self.times.append(time.perf_counter())
            yield token

    def report(self) -> str:
        memory = f"peak memory {peak_memory_bytes() / 1e9:.2f} GB"
        if not self.times:
            return f"no new tokens; {memory}"
        first = f"{len(self.times)} new, first after {self.times[0] - self.start:.2f} s"
        seconds = self.times[-1] - self.times[0]
        rate = f", then {(len(self.times) - 1) / seconds:.1f} tokens/s" if seconds > 0 else ""
        return f"{first}{rate}; {memory}"
