"""What answers prompts: a model with its tokenizer, its prompt style and how it samples."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lit_gpt.checkpoints.base_model import BaseCheckpoint
from lit_gpt.distributed.placement import place
from lit_gpt.errors import UsageError
from lit_gpt.generation.args import ModelArgs, SamplingArgs
from lit_gpt.generation.engine import check_context, prompt_ids
from lit_gpt.generation.sequence import Step
from lit_gpt.generation.steps import FastStep
from lit_gpt.hardware import DTYPES
from lit_gpt.methods.finetuned_model import build_finetuned
from lit_gpt.methods.multi_lora import LoRAPool
from lit_gpt.model.gpt import GPT
from lit_gpt.text.json_grammar import JSONGrammars, JSONText, Schema
from lit_gpt.text.messages import Message, Tools
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answerer:
    """Answers prompts.

    Attributes:
        style: of prompts for which no LoRA is named.
        compile: whether to compile the step of one token where no kernels serve it.
        loras: those that prompts may name, with their styles; None: they may name none.
        lora_path: the LoRA of prompts that name none; None: the base alone.
    """

    model: GPT
    tokenizer: Tokenizer
    style: PromptStyle
    sampling: SamplingArgs
    compile: bool = False
    loras: LoRAPool | None = None
    lora_path: Path | None = None

    @classmethod
    def from_finetuned(
        cls, checkpoint_dir: Path, path: Path, method: str | None, sampling: SamplingArgs, args: ModelArgs
    ) -> "Answerer":
        """Load a base with a finetuned file attached, whose prompt style it answers in.

        Args:
            method: name of the only method to admit; None: any.

        Raises:
            UserError: the folder is no converted checkpoint, or the file does not fit it.
        """
        base = BaseCheckpoint.open(checkpoint_dir, args.quantize, resident=True)
        model, record = build_finetuned(base, path, method, DTYPES[args.precision], place(args.device, args.devices))
        return cls(model, base.tokenizer, PromptStyle.from_dict(record["prompt_style"]), sampling, args.compile)

    def held_to(self, schema: Schema | None, style: PromptStyle) -> JSONText | None:
        """Return what holds an answer to a JSON schema; None: nothing does.

        Raises:
            UsageError: nothing can.
        """
        if schema is None:
            return None
        try:
            return self.grammars.held_to(schema, style.stop_ids)
        except ValueError as error:
            raise UsageError(f"--json_schema: {error}") from None

    @cached_property
    def grammars(self) -> JSONGrammars:
        return JSONGrammars(self.tokenizer, self.model.config.padded_vocab_size, "--json_schema")

    def step(self) -> Step:
        return FastStep(self.model, self.compile)

    def ids(self, messages: list[Message], style: PromptStyle, tools: Tools = None) -> list[int]:
        """Return the tokens up to the answer.

        Raises:
            UserError: there is none, or prompt and answer exceed the model's context.
        """
        ids = prompt_ids(messages, self.model, self.tokenizer, style, tools)
        check_context(self.model, len(ids), self.sampling.max_new_tokens)
        return ids
