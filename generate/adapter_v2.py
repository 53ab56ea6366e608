"""Generate text from a checkpoint with Adapter v2 weights.

    python generate/adapter_v2.py --checkpoint_dir checkpoints/tiiuae/falcon-7b \\
        --adapter_path out/adapter_v2/alpaca/lit_model_adapter_v2_finetuned.pth --prompt "..."

The prompt is rendered in the style of the finetune. The text goes to stdout as it comes, speed and memory to stderr.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from lit_gpt.cli import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveInt, Quantizer, run

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # converted folder of the base
adapter_path: Path = Path("out/adapter_v2/alpaca/lit_model_adapter_v2_finetuned.pth")  # from finetune/adapter_v2.py
prompt: str = ""  # what to answer
prompt_file: Path | None = None  # file that holds the prompt (- is standard input); a .jsonl file: one on each line
out: Path | None = None  # .jsonl file for the answers to a .jsonl file of prompts; a run that was stopped goes on there
input: str = ""  # context that goes with an instruction
max_new_tokens: PositiveInt = 100  # longest answer
num_samples: PositiveInt = 1  # answers to give
batch_size: PositiveInt = 16  # lines of a .jsonl file that are answered together
temperature: NonNegativeFloat = 0.8  # divides the logits: higher is more varied, 0 takes the likeliest token
top_k: PositiveInt | None = 200  # sample among this many likeliest tokens (null: all)
top_p: ClosedUnitInterval = 1.0  # sample among the likeliest tokens of together this probability
seed: NonNegativeInt = 1234  # of the sampling
precision: Literal["bf16", "fp16", "fp32"] = "bf16"  # of weights and arithmetic
quantize: Quantizer | None = None  # keep the weights in fewer bits (null: as trained, or as stored)
compile: bool = False  # compile the step of one token where there are no kernels for it: takes seconds at first


def main(hp: SimpleNamespace) -> None:
    from lit_gpt.generation.answer import answer, read_prompt
    from lit_gpt.generation.engine import dtype_of
    from lit_gpt.hardware import default_device
    from lit_gpt.methods import finetuned_model
    from lit_gpt.text.prompt_style import PromptStyle
    from lit_gpt.text.tokenizer import Tokenizer

    prompt = read_prompt(hp)
    place = {"dtype": dtype_of(hp), "device": default_device(), "quantize": hp.quantize}
    model, record = finetuned_model.load_finetuned(hp.checkpoint_dir, hp.adapter_path, "adapter_v2", **place)
    answer(hp, prompt, model, Tokenizer(hp.checkpoint_dir), PromptStyle.from_dict(record["prompt_style"]))


if __name__ == "__main__":
    run(main)
