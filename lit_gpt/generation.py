"""Generating text: the one decoder loop, and what the generate scripts share around it."""

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lit_gpt.checkpoint import DTYPES
from lit_gpt.decoding import FastStep, Step
from lit_gpt.errors import UsageError, UserError
from lit_gpt.memory import peak_memory_bytes
from lit_gpt.model import GPT, KVCache, forget
from lit_gpt.prompts import PromptStyle, instruction_messages
from lit_gpt.tokenizer import Tokenizer


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
    limit = model.config.block_size
    if len(prompt) + max_new_tokens > limit:
        raise UserError(
            f"the prompt's {len(prompt)} tokens and --max_new_tokens {max_new_tokens} exceed the model's context of "
            f"{limit}; shorten the prompt or ask for fewer tokens"
        )
    stops = set(stop_ids)
    cache = cache or model.kv_cache(1, len(prompt) + max_new_tokens)
    for (token,) in decode(model, [prompt], max_new_tokens, cache, temperature, top_k, top_p, generator, step=step):
        if token in stops:
            return
        yield token


@torch.no_grad()
def decode(
    model: GPT,
    prompts: list[list[int]],
    steps: int,
    cache: KVCache,
    *sampling: Any,
    step: Step | None = None,
) -> Iterator[list[int]]:
    """The next token of each prompt, `steps` times.

    Args:
        prompts: token ids, as many in each; `cache` may hold a beginning of them, and has room for the answers.
        sampling: of `sample`, after the logits.
        step: gives the logits that follow a single token, for a single prompt.
    """
    rows = [list(prompt) for prompt in prompts]
    for _ in range(steps):
        if model.outdated(cache, len(rows[0])):
            forget(cache, 0)
        idx = torch.tensor([row[cache[0].length :] for row in rows], device=model.wte.weight.device)
        logits = step(idx, cache) if step and idx.size(1) == 1 else model(idx, cache=cache, last=True)[:, -1]
        tokens = torch.cat([sample(row, *sampling) for row in logits]).tolist()
        yield tokens
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)


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


def read_prompt(hp: SimpleNamespace) -> str:
    """The prompt from --prompt, or from --prompt_file ("-": standard input)."""
    if bool(hp.prompt) == bool(hp.prompt_file):
        raise UsageError("--prompt: expected a prompt, either by --prompt or by --prompt_file (- is standard input)")
    if hp.prompt:
        text = hp.prompt
    elif str(hp.prompt_file) == "-":
        text = sys.stdin.read()
    else:
        try:
            text = Path(hp.prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt_file {hp.prompt_file}: cannot be read ({error})") from None
    if not text:
        raise UsageError("--prompt_file: is empty")
    return text


def sampling_options(hp: SimpleNamespace, model: GPT) -> dict[str, Any]:
    """The options of `generate` that a script's flags set."""
    generator = torch.Generator(model.wte.weight.device).manual_seed(hp.seed)
    step = FastStep(model, hp.compile)
    return {
        "temperature": hp.temperature, "top_k": hp.top_k, "top_p": hp.top_p, "generator": generator, "step": step,
    }  # fmt: skip


def answer(hp: SimpleNamespace, text: str, model: GPT, tokenizer: Tokenizer, style: PromptStyle) -> None:
    """Print `num_samples` answers to the prompt as they come: the text on stdout, figures on stderr."""
    prompt = style.encode_prompt(instruction_messages(text, hp.input), tokenizer)
    if not prompt:
        raise UsageError("--prompt: holds no tokens")
    if max(prompt) >= model.config.padded_vocab_size:
        raise UserError(f"the tokenizer gives the id {max(prompt)}, which the model's embedding does not have")
    options = sampling_options(hp, model)
    for _ in range(hp.num_samples):
        clock = Clock()
        ids = generate(model, prompt, hp.max_new_tokens, stop_ids=style.stop_ids, **options)
        for piece in tokenizer.decode_stream(clock.watch(ids)):
            print(piece, end="", flush=True)
        print(flush=True)
        print(f"[prompt {len(prompt)} tokens, {clock.report()}]", file=sys.stderr)


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
