"""Answers for programs, in three lines.

from lit_gpt import LitGPT
model = LitGPT.load("checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct")
print(model.generate("Why is the sky blue?", temperature=0))
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from lit_gpt import cli, habits
from lit_gpt.checkpoints.base_model import BaseCheckpoint
from lit_gpt.errors import UsageError
from lit_gpt.generation.args import SamplingArgs
from lit_gpt.generation.engine import generate, new_generator, prompt_ids
from lit_gpt.generation.sequence import Step
from lit_gpt.generation.steps import FastStep
from lit_gpt.generation.stopping import answer_text
from lit_gpt.hardware import DTYPES, default_device
from lit_gpt.methods.finetuned_model import build_finetuned
from lit_gpt.model.gpt import GPT
from lit_gpt.text.messages import Message, Tools, instruction_messages
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class LitGPT:
    """A model with its tokenizer and prompt style, which answers prompts."""

    model: GPT
    tokenizer: Tokenizer
    style: PromptStyle
    step: Step

    @classmethod
    def load(
        cls,
        checkpoint_dir: str | Path,
        finetuned_path: str | Path | None = None,
        *,
        precision: str = "bf16",
        quantize: str | None = None,
        prompt_style: str | None = None,
        device: str | torch.device | None = None,
    ) -> "LitGPT":
        """Load a converted checkpoint, or what finetune/full.py wrote.

        Args:
            finetuned_path: attach this file of a finetune.
            precision: bf16, fp16 or fp32.
            quantize: keep the weights in this format of lit_gpt.quantization.formats; None: as trained, or as stored.
            prompt_style: render prompts in this style, or a Jinja file; None: the finetune's or the checkpoint's.
            device: None: the GPU if there is one, else the CPU.

        Raises:
            UserError: the folder is no converted checkpoint, or the file does not fit it.
        """
        if precision not in DTYPES:
            raise UsageError(f"precision {precision!r}: expected one of {', '.join(DTYPES)}")
        base = BaseCheckpoint.open(Path(checkpoint_dir), quantize, resident=True)
        place = DTYPES[precision], torch.device(device) if device else default_device()
        style = PromptStyle.from_name(prompt_style, base.tokenizer) if prompt_style else None
        if finetuned_path is None:
            model, style = base.build(*place), style or base.prompt_style
        else:
            model, record = build_finetuned(base, Path(finetuned_path), None, *place)
            style = style or PromptStyle.from_dict(record["prompt_style"])
        return cls(model, base.tokenizer, style, FastStep(model))

    def generate(self, prompt: str | list[Message], **options: Any) -> str:
        """Return the answer to a prompt, or to a conversation. The options are those of `stream`."""
        return "".join(self.stream(prompt, **options))

    def stream(
        self,
        prompt: str | list[Message],
        *,
        max_new_tokens: int = 100,
        stop: Sequence[str] = (),
        seed: int | None = None,
        tools: Tools = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """Yield pieces of the answer as they come.

        Args:
            prompt: a text, rendered as an instruction in the prompt style, or messages {"role", "content"}.
            stop: end the answer before the first of these strings.
            seed: of the sampling; None: another each time.
            tools: that the conversation may call, as JSON schemas.
            sampling: the attributes of `lit_gpt.generation.sampling.Sampling`, such as temperature.

        Raises:
            UsageError: there is no such option, or its value is none that the scripts' flag of this name takes.
            UserError: the template refuses the messages, or prompt and answer exceed the model's context.
        """
        given = {} if seed is None else {"seed": seed}
        check_options({"max_new_tokens": max_new_tokens, "stop": stop, **given, **sampling})
        messages = instruction_messages(prompt) if isinstance(prompt, str) else prompt
        ids = prompt_ids(messages, self.model, self.tokenizer, self.style, tools)
        generator = None if seed is None else new_generator(self.model, seed)
        options = {"stop_ids": self.style.stop_ids, "generator": generator, "step": self.step, **sampling}
        return answer_text(self.tokenizer, generate(self.model, ids, max_new_tokens, **options), stop)


def check_options(options: dict[str, Any]) -> None:
    """Refuse options of an answer that there are not, or values that the flags of these names do not take.

    Raises:
        UsageError
    """
    kinds = get_type_hints(SamplingArgs)
    for name, value in options.items():
        if name not in kinds:
            near, known = habits.nearest(name, kinds), ", ".join([*kinds, "tools"])
            raise UsageError(f"{name}: no such option; " + (f"did you mean {near}?" if near else f"expected {known}"))
        if not admits(kinds[name], value):
            raise UsageError(f"{name}: expected {cli.expected(kinds[name])}, got {value!r}")


def admits(kind: Any, value: Any) -> bool:
    """Return whether a value is of a flag's type."""
    if kind == list[str]:
        return not isinstance(value, str) and all(isinstance(part, str) for part in value)
    for choice in get_args(kind) or (kind,):
        with suppress(TypeError, ValueError):
            if value is None if choice is type(None) else choice(value) == value:
                return True
    return False
