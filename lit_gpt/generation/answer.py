"""What the generate scripts share: reading the prompt and printing the answer."""

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from lit_gpt.errors import UsageError, UserError
from lit_gpt.hardware import peak_memory_bytes
from lit_gpt.model.gpt import GPT
from lit_gpt.model.kv_cache import truncate
from lit_gpt.text.messages import instruction_messages
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lit_gpt.generation.prompt_file import PromptFile
    from lit_gpt.methods.multi_lora import LoRAPool
from lit_gpt.generation.engine import check_context, generate, prompt_ids, sampling_options
from lit_gpt.generation.steps import new_step


def read_prompt(hp: SimpleNamespace) -> "str | PromptFile":
    """The prompt from --prompt, or from --prompt_file ("-": standard input); with --out, the prompts of that file."""
    if bool(hp.prompt) == bool(hp.prompt_file):
        raise UsageError("--prompt: expected a prompt, either by --prompt or by --prompt_file (- is standard input)")
    if hp.out:
        from lit_gpt.generation.prompt_file import PromptFile

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


def answer(
    hp: SimpleNamespace,
    prompt: "str | PromptFile",
    model: GPT,
    tokenizer: Tokenizer,
    style: PromptStyle,
    loras: "LoRAPool | None" = None,
) -> None:
    """Print `num_samples` answers to the prompt as they come: the text on stdout, figures on stderr. Or answer a
    file."""
    if not isinstance(prompt, str):
        return prompt.answer(hp, model, tokenizer, style, loras)
    ids = prompt_ids(instruction_messages(prompt, hp.input), model, tokenizer, style)
    check_context(model, len(ids), hp.max_new_tokens)
    cache = model.kv_cache(1, len(ids) + hp.max_new_tokens)
    options = sampling_options(hp, model) | {"step": new_step(hp, model), "cache": cache}
    for _ in range(hp.num_samples):
        truncate(cache, len(ids) - 1)
        clock = TokenTimer()
        new = generate(model, ids, hp.max_new_tokens, stop_ids=style.stop_ids, **options)
        try:
            for piece in tokenizer.decode_stream(clock.watch(new)):
                print(piece, end="", flush=True)
        finally:
            print(flush=True)
        print(f"[prompt {len(ids)} tokens, {clock.report()}]", file=sys.stderr)


class TokenTimer:
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
