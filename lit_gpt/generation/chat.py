"""A conversation with a model: its history, within the context, and a cache that lives as long as it does."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from lit_gpt.errors import UsageError, UserError
from lit_gpt.generation.args import SamplingArgs
from lit_gpt.generation.engine import generate, new_generator
from lit_gpt.generation.sampling import Sampling
from lit_gpt.generation.steps import FastStep
from lit_gpt.generation.stopping import answer_text
from lit_gpt.methods.multi_lora import LoRAPool
from lit_gpt.model.gpt import GPT
from lit_gpt.model.kv_cache import truncate
from lit_gpt.text.messages import Message, instruction_messages
from lit_gpt.text.prompt_style import PromptStyle, common_prefix
from lit_gpt.text.tokenizer import Tokenizer


class Chat:
    """Keeps the messages, and in the cache whatever of them is already computed.

    Args:
        context: tokens of history and answer together.
        sampling: how answers are sampled, and how long they may be.
        open_loras: makes a model beside which LoRAs can be switched; None: they cannot.
        compile: whether to compile the step of one token where no kernels serve it.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        style: PromptStyle,
        context: int,
        sampling: SamplingArgs,
        open_loras: Callable[[], LoRAPool] | None = None,
        compile: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.style, self.sampling = model, tokenizer, style, sampling
        self.open_loras = open_loras
        self.loras: LoRAPool | None = None
        self.compile, self.step = compile, FastStep(model, compile)
        self.generator = new_generator(model, sampling.seed)
        self.context, self.max_new_tokens = min(context, model.config.block_size), sampling.max_new_tokens
        if self.max_new_tokens >= self.context:
            raise UsageError(
                f"--max_new_tokens {self.max_new_tokens}: leaves a message no room in the context of {self.context}; "
                "ask for fewer, or raise --context"
            )
        self.messages: list[Message] = []
        self.instruction = ""  # of which messages are the input, if it is set
        self.cache = model.kv_cache(1, self.context)
        self.cached: list[int] = []  # the tokens behind the cache's entries

    def use(self, path: Path | None) -> None:
        """Answer through the LoRA of a file from now on, in its prompt style; None: as the base alone does.

        Raises:
            UserError: it cannot be had. All stays as it is.
        """
        if self.open_loras is None:
            raise UserError("/lora: an Adapter is attached; start without --finetuned_path to use LoRAs")
        loras = self.loras or self.open_loras()
        number = loras.load(path) if path else 0
        loras.choose([number])
        self.loras, self.model, self.style = loras, loras.model, loras.style_of(number)
        self.step = FastStep(self.model, self.compile)
        truncate(self.cache, 0)
        self.cached = []

    def prompt(self) -> list[int]:
        """Return the tokens up to the next answer; the oldest turns leave until an answer has room.

        Raises:
            UserError: the newest message alone is too long, holds no tokens, or is no text.
        """
        left = 0
        while True:
            ids = self.style.encode_prompt(self.messages, self.tokenizer)
            if not ids:
                raise UserError(
                    f"not sent: the message holds no tokens in the prompt style '{self.style.name}'; write another, or "
                    "choose another --prompt_style"
                )
            ids = [*self.model.virtual_tokens, *ids]
            if len(ids) + self.max_new_tokens <= self.context:
                break
            first = int(self.messages[0]["role"] == "system")
            if len(self.messages) == first + 1:
                raise UserError(
                    f"not sent: the message makes {len(ids)} tokens, which with --max_new_tokens {self.max_new_tokens} "
                    f"exceed the context of {self.context}"
                )
            del self.messages[first : first + 2]
            left += 1
        if left:
            print(f"[the oldest {left} turns no longer fit the context and are forgotten]", file=sys.stderr)
        return ids

    def answer(self, text: str) -> Iterator[str]:
        """Yield pieces of the answer to a message. What was answered is kept, also if it is cut short.

        Raises:
            UserError: `prompt` refuses the message, which is taken back.
        """
        told = instruction_messages(self.instruction, text) if self.instruction else [{"role": "user", "content": text}]
        self.messages += told
        try:
            prompt = self.prompt()
        except UserError:
            self.messages.pop()
            raise
        truncate(self.cache, min(common_prefix(self.cached, prompt), len(prompt) - 1))
        pieces: list[str] = []
        ids: list[int] = []
        try:
            for piece in answer_text(self.tokenizer, self._watch(prompt, ids), self.sampling.stop):
                pieces.append(piece)
                yield piece
        finally:
            known = min(layer.length for layer in self.cache)  # Ctrl-C may come between layers
            truncate(self.cache, known)
            self.cached = (prompt + ids)[: self.cache[0].length]
            self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _watch(self, prompt: list[int], ids: list[int]) -> Iterator[int]:
        tokens = generate(
            self.model, prompt, self.max_new_tokens, stop_ids=self.style.stop_ids, generator=self.generator,
            cache=self.cache, step=self.step, **asdict(Sampling.of(self.sampling)),
        )  # fmt: skip
        for token in tokens:
            ids.append(token)
            yield token
