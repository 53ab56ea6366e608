"""Generate text from a converted checkpoint.

    python generate/base.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --prompt "Hello, my name is"

The text goes to stdout as it comes; speed and memory go to stderr.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from lit_gpt.cli import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveInt, Quantizer, run

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # converted folder
prompt: str = ""  # what to continue or answer
prompt_file: Path | None = None  # file that holds the prompt (- is standard input); a .jsonl file: one on each line
out: Path | None = None  # .jsonl file for the answers to a .jsonl file of prompts; a run that was stopped goes on there
input: str = ""  # context that goes with an instruction, for prompt styles that have a place for it
prompt_style: str | None = None  # alpaca, chatml, llama2, falcon-instruct, plain, a Jinja file (null: the checkpoint's)
max_new_tokens: PositiveInt = 50  # longest answer
num_samples: PositiveInt = 1  # answers to give
batch_size: PositiveInt = 16  # lines of a .jsonl file that are answered together
temperature: NonNegativeFloat = 0.8  # divides the logits: higher is more varied, 0 takes the likeliest token
top_k: PositiveInt | None = 200  # sample among this many likeliest tokens (null: all)
top_p: ClosedUnitInterval = 1.0  # sample among the likeliest tokens of together this probability
seed: NonNegativeInt = 1234  # of the sampling
precision: Literal["bf16", "fp16", "fp32"] = "bf16"  # of weights and arithmetic
quantize: Quantizer | None = None  # keep the weights in fewer bits (null: as stored)
compile: bool = False  # compile the step of one token where there are no kernels for it: takes seconds at first


def main(hp: SimpleNamespace) -> None:
    from lit_gpt.checkpoints.base_model import BaseCheckpoint
    from lit_gpt.generation.answer import answer, lora_paths, read_prompt
    from lit_gpt.generation.engine import dtype_of
    from lit_gpt.hardware import default_device
    from lit_gpt.methods.multi_lora import LoRAPool
    from lit_gpt.text.prompt_style import PromptStyle
    from lit_gpt.text.tokenizer import Tokenizer

    prompt, base, tokenizer = (
        read_prompt(hp),
        BaseCheckpoint.of(hp.checkpoint_dir, hp.quantize),
        Tokenizer(hp.checkpoint_dir),
    )
    style = hp.prompt_style and PromptStyle.from_name(hp.prompt_style, tokenizer)
    style = style or PromptStyle.from_checkpoint(hp.checkpoint_dir, tokenizer)
    place = {"dtype": dtype_of(hp), "device": default_device(), "fixed": bool(hp.prompt_style)}
    loras = LoRAPool.beside(base, lora_paths(prompt), style, **place)
    answer(hp, prompt, loras.model, tokenizer, style, loras)


if __name__ == "__main__":
    run(main)
