"""The arguments that the generate scripts and chat share, as flags. Nothing here imports torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lit_gpt.cli import (
    ClosedUnitInterval,
    Device,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Quantizer,
)
from lit_gpt.errors import UsageError, UserError
from lit_gpt.files import check_out_file


def context_of(asked: int | None, usual: int, block_size: int) -> int:
    """Return how many tokens prompt and answer may have together.

    Args:
        asked: by --context; None: the usual number, or what the model takes if that is less.
        block_size: what the model takes.

    Raises:
        UsageError: more is asked for than the model takes.
    """
    if asked and asked > block_size:
        raise UsageError(
            f"--context {asked}: the model takes {block_size} tokens; give at most so many, or stretch its context by "
            "scripts/extend.py"
        )
    return asked or min(usual, block_size)


@dataclass(frozen=True)
class PromptArgs:
    """Prompt"""

    prompt: str = ""  # Answer this, or continue it.
    prompt_file: Path | None = None  # Read the prompt from here (- is standard input); of a .jsonl file, one a line.
    out: Path | None = None  # Write the answers to a .jsonl file of prompts here; a run that was stopped goes on.
    input: str = ""  # Give this context with an instruction, for prompt styles that have a place for it.
    num_samples: PositiveInt = 1  # Give this many answers.
    batch_size: PositiveInt = 16  # Answer this many lines of a .jsonl file together.
    json_schema: Path | None = None  # Hold each answer to JSON of the schema in this file.

    def __post_init__(self) -> None:
        if self.prompt and self.prompt_file:
            raise UsageError(f"--prompt and --prompt_file {self.prompt_file}: are two prompts; leave one of them out")
        if not self.prompt and not self.prompt_file:
            raise UsageError(
                "--prompt: expected a prompt, either by --prompt or by --prompt_file (- is standard input)"
            )
        lines = self.prompt_file is not None and self.prompt_file.suffix.lower() == ".jsonl"
        if lines and self.out is None:
            raise UsageError(
                f"--prompt_file {self.prompt_file}: holds a prompt on each line; add --out FILE for the answers"
            )
        if self.out:
            self.check_out(lines)
            check_out_file(self.out)
        for flag, path in (("prompt_file", self.prompt_file), ("json_schema", self.json_schema)):
            if path and str(path) != "-" and not path.exists():
                raise UserError(f"--{flag} {path}: no such file")
            if path and path.is_dir():
                raise UserError(f"--{flag} {path}: is a folder; expected a file in it")

    def check_out(self, lines: bool) -> None:
        """Refuse what does not go with --out. Raises UsageError."""
        if not lines:
            raise UsageError("--out: goes with --prompt_file FILE.jsonl, which holds a prompt on each line")
        if self.num_samples != 1:
            raise UsageError("--num_samples: each line of --prompt_file gets one answer; repeat a line to get several")
        if self.input:
            raise UsageError('--input: goes with --prompt; a line of --prompt_file has its own "input"')
        if self.out and self.prompt_file and self.out.resolve() == self.prompt_file.resolve():
            raise UsageError(f"--out {self.out}: is the file of the prompts; choose another")


@dataclass(frozen=True)
class SamplingArgs:
    """Sampling"""

    max_new_tokens: PositiveInt = 100  # Answer with at most this many tokens.
    temperature: NonNegativeFloat = 0.8  # Divide the logits: higher is more varied, 0 takes the likeliest token.
    top_k: PositiveInt | None = 200  # Sample among this many likeliest tokens (null: all).
    top_p: ClosedUnitInterval = 1.0  # Sample among the likeliest tokens of together this probability.
    min_p: ClosedUnitInterval = 0.0  # Leave out tokens of less than this part of the likeliest token's probability.
    repetition_penalty: PositiveFloat = 1.0  # Make tokens that are there already less likely by this factor.
    stop: list[str] = field(default_factory=list)  # End the answer before the first of these strings.
    seed: NonNegativeInt = 1234  # Seed the sampling.


@dataclass(frozen=True)
class ModelArgs:
    """Model"""

    device: Device = "auto"
    devices: PositiveInt = 1  # Place the layers on this many GPUs in turn, for a model that one does not hold.
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"  # Keep weights and compute in this.
    quantize: Quantizer | None = None  # Keep the weights in fewer bits (null: as trained, or as stored).
    compile: bool = False  # Compile the step of one token where no kernels serve it: takes seconds at first.

    def __post_init__(self) -> None:
        if self.compile and self.devices > 1:
            raise UsageError(f"--compile true: serves one device, not --devices {self.devices}; leave one out")
