"""What the generate scripts share: reading the prompt, and printing answers to it or to each line of a file."""

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lit_gpt import files
from lit_gpt.errors import UsageError, UserError, reason
from lit_gpt.generation.answerer import Answerer
from lit_gpt.generation.args import ModelArgs, PromptArgs, SamplingArgs
from lit_gpt.generation.engine import generate, new_generator
from lit_gpt.generation.prompt_file import PromptFile, settings_hash
from lit_gpt.generation.sampling import Sampling
from lit_gpt.generation.stopping import answer_text
from lit_gpt.hardware import peak_memory_bytes
from lit_gpt.model.kv_cache import truncate
from lit_gpt.text.json_grammar import Schema, read_schema
from lit_gpt.text.messages import instruction_messages


@dataclass(frozen=True)
class TextPrompt:
    """A single prompt, to be answered on stdout."""

    text: str
    input: str
    num_samples: int
    schema: Schema | None = None  # of the JSON that answers are held to

    @property
    def lora_paths(self) -> list[Path | None]:
        """Return none: a single prompt names no LoRA."""
        return []

    def answer(self, answerer: Answerer) -> None:
        """Print the answers as they come: the text on stdout, figures on stderr."""
        model, sampling, style = answerer.model, answerer.sampling, answerer.style
        ids = answerer.ids(instruction_messages(self.text, self.input), style)
        cache = model.kv_cache(1, len(ids) + sampling.max_new_tokens)
        generator, step = new_generator(model, sampling.seed), answerer.step()
        for _ in range(self.num_samples):
            truncate(cache, len(ids) - 1)
            timer, held = TokenTimer(), answerer.held_to(self.schema, style)
            tokens = generate(
                model, ids, sampling.max_new_tokens, stop_ids=style.stop_ids, generator=generator, cache=cache,
                step=step, constraint=held, **asdict(Sampling.of(sampling)),
            )  # fmt: skip
            try:
                for piece in answer_text(answerer.tokenizer, timer.watch(tokens), sampling.stop):
                    print(piece, end="", flush=True)
            finally:
                print(flush=True)
            print(f"[prompt {len(ids)} tokens, {timer.report()}]", file=sys.stderr)


def read_prompt(args: PromptArgs, sampling: SamplingArgs, model: ModelArgs, **own: Any) -> TextPrompt | PromptFile:
    """Read the prompt from --prompt or --prompt_file ("-": standard input); with --out, the prompts of that file.

    Args:
        own: the script's own flags on which an answer depends.
    """
    schema = read_schema(args.json_schema) if args.json_schema else None
    if args.out:
        own |= {"json_schema": schema} if schema else {}
        return PromptFile.read(args, args.out, model.compile, settings_hash(sampling, model, own), schema)
    text = read_text(args.prompt_file) if args.prompt_file else args.prompt
    return TextPrompt(text, args.input, args.num_samples, schema)


def answer_finetuned(
    checkpoint_dir: Path, path: Path, method: str | None, prompt: PromptArgs, sampling: SamplingArgs, model: ModelArgs
) -> None:
    """Answer by a base with a finetuned file attached, in the prompt style of the finetune.

    Args:
        method: name of the only method to admit; None: any.
    """
    prompts = read_prompt(prompt, sampling, model, checkpoint_dir=checkpoint_dir, finetuned_path=path)
    prompts.answer(Answerer.from_finetuned(checkpoint_dir, path, method, sampling, model))


def read_text(path: Path) -> str:
    try:
        text = sys.stdin.read().removeprefix("\ufeff") if str(path) == "-" else files.read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt_file {path}: cannot be read ({reason(error)})") from None
    without = text.removesuffix("\n").removesuffix("\r")
    if not without:
        raise UsageError("--prompt_file: is empty")
    if without != text:  # editors and echo end a text so, and a model would go on in a new line
        print(f"[the newline at the end of {path} is left out; end it with two to keep one]", file=sys.stderr)
    return without


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
