"""Answers to a file of prompts: one a line, in batches, into another file.

An answer is written as soon as it is there, so that a run that was killed goes on where it stopped. At the end the
lines are put in the prompts' order.
"""

import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lit_gpt.data.sources import Source
from lit_gpt.errors import UsageError, UserError
from lit_gpt.files import atomic, take_lock
from lit_gpt.generation.answerer import Answerer
from lit_gpt.generation.args import ModelArgs, PromptArgs, SamplingArgs
from lit_gpt.generation.engine import decode, new_generator
from lit_gpt.generation.sampling import Sampling
from lit_gpt.generation.sequence import DecodingRow
from lit_gpt.generation.stopping import AnswerText, answer_text
from lit_gpt.hardware import peak_memory_bytes
from lit_gpt.text.json_grammar import Schema
from lit_gpt.text.messages import (
    Message,
    Tools,
    instruction_messages,
    read_history,
    read_messages,
    read_tools,
    text_of,
    with_system,
)

SHAREGPT = "conversations"  # another name of messages
OURS = ("answer", "ended", "row", "settings")  # what an answer's line has besides the prompt's fields
FORMS = ("prompt", "instruction", "messages", SHAREGPT)  # what a prompt may be; a line has one of them
SAMPLING = {"top_k", "top_p", "min_p", "seed"}  # flags that change no answer at temperature 0
NEUTRAL = {"min_p", "repetition_penalty", "stop"}  # flags that change no answer unless they are given


@dataclass
class Prompt:
    """A line of the file."""

    row: int  # counted from 1, lines that hold nothing apart
    where: str  # file and line
    fields: dict[str, Any]
    messages: list[Message]
    tools: Tools
    lora_path: Path | None


@dataclass
class PromptFile:
    """The prompts that can be read, what is wrong with the others, and the answers that are there already."""

    path: Path
    out: Path
    settings: str  # of the run that answers them, in a few letters
    batch_size: int  # lines that are answered together
    schema: Schema | None = None  # of the JSON that answers are held to
    rows: int = 0  # lines that hold something
    prompts: list[Prompt] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)  # by row

    @classmethod
    def read(
        cls, args: PromptArgs, out: Path, compile: bool, settings: str, schema: Schema | None = None
    ) -> "PromptFile":
        """Read the file that the flags name; lines that cannot be read are reported.

        Raises:
            UsageError: flags that do not go together.
            UserError: there is no such file, or the answers in --out are to something else.
        """
        assert args.prompt_file is not None  # refused by PromptArgs
        if compile and args.batch_size > 1:
            raise UsageError("--compile true: serves one row at a time; leave it out, or add --batch_size 1")
        file = cls(args.prompt_file, out, settings, args.batch_size, schema)
        for row in Source(str(file.path)).rows():
            file.rows += 1
            try:
                if row.problem:
                    raise ValueError(row.problem)
                file.prompts.append(Prompt(file.rows, row.where, row.fields, *parse_prompt(row.fields)))
            except (TypeError, ValueError) as error:
                file.report(f"{row.where}: {error}")
        if not file.rows:
            raise UserError(f"--prompt_file {file.path}: holds no prompts")
        file.read_answers()
        return file

    @property
    def lora_paths(self) -> list[Path | None]:
        """Return the LoRAs that lines name, and None if there are lines that name none."""
        return list(dict.fromkeys(prompt.lora_path for prompt in self.prompts))

    def report(self, problem: str) -> None:
        print(problem, file=sys.stderr)
        self.problems.append(problem)

    def read_answers(self) -> None:
        """Read the answers that an earlier run has left; a last line that it did not finish is cut off.

        Raises:
            UserError: they are not to these prompts, or were made with other settings.
        """
        if not self.out.exists():
            return
        contents = self.out.read_bytes()
        *lines, unfinished = contents.split(b"\n")
        asked = {prompt.row: prompt.fields for prompt in self.prompts}
        for number, line in enumerate(lines, 1):
            try:
                answer = json.loads(line)
                row, settings = answer["row"], answer["settings"]
                fields = {name: value for name, value in answer.items() if name not in OURS}
                assert isinstance(answer["answer"], str)
            except (ValueError, TypeError, KeyError, AssertionError):
                raise self.refusal(number, "is no answer of this script") from None
            if fields != asked.get(row):
                raise self.refusal(number, f"answers another prompt than row {row} of {self.path}")
            if settings != self.settings:
                raise self.refusal(number, "was answered by another checkpoint or with other flags")
            self.answers[row] = answer
        if unfinished:
            if not self.may_begin(unfinished):
                raise self.refusal(len(lines) + 1, "is no answer of this script")
            with open(self.out, "rb+") as file:
                file.truncate(len(contents) - len(unfinished))
            print(f"[the last line of {self.out} was cut short, and is done again]", file=sys.stderr)
        if self.answers:
            print(f"[{len(self.answers)} of {self.rows} rows are answered already in {self.out}]", file=sys.stderr)

    def may_begin(self, unfinished: bytes) -> bool:
        """Return whether an answer's line may begin like this."""
        for prompt in self.prompts:
            known = json.dumps(prompt.fields | {OURS[0]: ""}, ensure_ascii=False).encode()[:-2]
            if unfinished.startswith(known) or known.startswith(unfinished):
                return True
        return False

    def refusal(self, line: int, problem: str) -> UserError:
        return UserError(f"--out {self.out}: line {line} {problem}; choose another file, or remove this one")

    def answer(self, answerer: Answerer) -> None:
        """Answer what is not answered yet.

        Raises:
            UserError: at the end, if there are lines without an answer.
        """
        if any(self.lora_paths) and answerer.loras is None:
            raise UserError(f"{self.path}: has lines with a lora_path, which generate/lora.py and base.py answer")
        start, total = time.perf_counter(), 0
        asked = list(self.requests(answerer))
        bar = tqdm(total=self.rows, initial=len(self.answers), desc="answering", unit=" rows", disable=None)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with open(self.out, "a", encoding="utf-8") as file, bar:
            take_lock(file.fileno(), self.out)
            for request, ids, ended in answers(answerer, asked, self.batch_size):
                bar.update()
                total += len(ids)
                text = "".join(answer_text(answerer.tokenizer, ids, answerer.sampling.stop))
                ours = text, ended, request.prompt.row, self.settings
                line = request.prompt.fields | dict(zip(OURS, ours, strict=True))
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                self.answers[request.prompt.row] = line
        self.put_in_order()
        seconds = time.perf_counter() - start
        print(
            f"[{len(asked)} answers, {total} new tokens in {seconds:.1f} s, {total / seconds:.1f} tokens/s; "
            f"peak memory {peak_memory_bytes() / 1e9:.2f} GB; wrote {self.out}]",
            file=sys.stderr,
        )
        if self.problems:
            raise UserError(
                f"{len(self.problems)} of {self.rows} rows are not answered, the first is {self.problems[0]}; the "
                f"others are in {self.out}"
            )

    def requests(self, answerer: Answerer) -> Iterator["Request"]:
        """Yield what is to be answered; what cannot be is reported."""
        loras, sampling = answerer.loras, answerer.sampling
        for prompt in self.prompts:
            if prompt.row in self.answers:
                continue
            path = prompt.lora_path or answerer.lora_path
            number = loras.load(path) if loras and path else 0
            style = loras.style_of(number) if loras and number else answerer.style
            try:
                ids = answerer.ids(prompt.messages, style, prompt.tools)
            except UserError as error:
                self.report(f"{prompt.where}: {error}")
                continue
            generator = new_generator(answerer.model, seed_of(sampling.seed, prompt.row))
            row = DecodingRow(ids, sampling.max_new_tokens, generator, lora=number, sampling=Sampling.of(sampling))
            row.constraint = answerer.held_to(self.schema, style)
            text = AnswerText(answerer.tokenizer, sampling.stop)
            yield Request(prompt, row, len(ids), style.stop_ids, text if sampling.stop else None)

    def put_in_order(self) -> None:
        if list(self.answers) != sorted(self.answers):
            with atomic(self.out) as temporary, open(temporary, "w", encoding="utf-8") as file:
                for row in sorted(self.answers):
                    file.write(json.dumps(self.answers[row], ensure_ascii=False) + "\n")


def settings_hash(sampling: SamplingArgs, model: ModelArgs, own: dict[str, Any]) -> str:
    """Return a few letters that stand for all flags on which an answer depends, but for rounding."""
    flags = {**own, **asdict(sampling), "precision": model.precision, "quantize": model.quantize}
    names = flags.keys() - (set() if sampling.temperature else SAMPLING)
    names -= {name for name in NEUTRAL if flags[name] == getattr(SamplingArgs(), name)}
    values = {name: str(v.resolve() if isinstance(v := flags[name], Path) else v) for name in names}
    return blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=4).hexdigest()


@dataclass(eq=False)
class Request:
    prompt: Prompt
    row: DecodingRow
    length: int  # of the prompt
    stop_ids: tuple[int, ...]
    text: AnswerText | None  # where there are strings that end an answer

    def ended(self, token: int) -> bool:
        """Take a token of the answer, and return whether the answer ends by it."""
        if token in self.stop_ids or self.text is None:
            return token in self.stop_ids
        self.text.push(token)
        return self.text.ended


def parse_prompt(fields: dict[str, Any]) -> tuple[list[Message], Tools, Path | None]:
    """Parse the messages, tools and LoRA of a line.

    Raises:
        TypeError, ValueError: what is wrong with it.
    """
    forms = [name for name in FORMS if fields.get(name) is not None]
    if len(forms) != 1:
        found = ", ".join(fields) or "nothing"
        raise ValueError(f"expected exactly one of the fields {', '.join(FORMS)}, found {found}")
    if taken := sorted(fields.keys() & set(OURS)):
        raise ValueError(f"has a field '{taken[0]}', which the answer's line has for itself; rename it")
    json.dumps(fields, ensure_ascii=False).encode()  # JSON can spell half of an emoji
    (form,), named = forms, text_of(fields, "lora_path")
    lora_path = Path(named).expanduser() if named else None
    if lora_path and not lora_path.is_file():
        raise ValueError(f"the field 'lora_path' is {lora_path}, which is no file")
    context, history, tools = text_of(fields, "input"), read_history(fields.get("history")), fields.get("tools")
    if form in ("messages", SHAREGPT) or isinstance(fields[form], list):
        if context or history:
            raise ValueError(f"the field '{'input' if context else 'history'}' does not go with '{form}'")
        messages = read_messages(fields[form], form)
    else:
        if tools:
            raise ValueError("the field 'tools' goes with 'messages'")
        messages = history + instruction_messages(text_of(fields, form), context)
    if messages[-1]["role"] == "assistant":
        raise ValueError("the last message is the assistant's; expected one to be answered")
    return with_system(text_of(fields, "system"), messages), read_tools(tools), lora_path


def answers(answerer: Answerer, requests: list[Request], batch_size: int) -> Iterator[tuple[Request, list[int], bool]]:
    """Yield the answer to each request as it is ready, and whether it came to its end."""
    if not requests:
        return
    model, sampling, loras = answerer.model, answerer.sampling, answerer.loras
    by_row = {request.row: request for request in requests}
    # the longest first, so that memory runs out at once if it must, and few rows are left over at the end
    rows = sorted(by_row, key=lambda row: len(row.ids), reverse=True)
    cache = model.kv_cache(min(batch_size, len(rows)), len(rows[0].ids) + sampling.max_new_tokens)

    def choose(rows: list[DecodingRow]) -> None:
        if loras:
            loras.choose([row.lora for row in rows])

    for row, token in decode(model, rows, cache, step=answerer.step(), choose=choose):
        request = by_row[row]
        if ended := request.ended(token):
            row.remaining = 0
        if not row.remaining:
            yield request, row.ids[request.length : len(row.ids) - (token in request.stop_ids)], ended


def seed_of(seed: int, row: int) -> int:
    """Return the seed of a row's sampling, which does not depend on the others in its batch."""
    return random.Random(f"{seed} {row}").getrandbits(63)
