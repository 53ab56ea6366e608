"""Generate text from a checkpoint with LoRA weights.

    python generate/lora.py --checkpoint_dir checkpoints/tiiuae/falcon-7b \\
        --lora_path out/lora/alpaca/lit_model_lora_finetuned.pth --prompt "..."

The prompt is rendered in the style of the finetune. The text goes to stdout as it comes, speed and memory to stderr.
In a file of prompts a line may name a `lora_path` of its own; all are answered in one batch.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from lit_gpt.cli import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveInt, Quantizer, run

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # converted folder of the base
lora_path: Path = Path("out/lora/alpaca/lit_model_lora_finetuned.pth")  # what finetune/lora.py wrote
merge: bool | None = None  # fold LoRA into the weights when loading, dequantized (null: if they are not quantized)
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
    from lit_gpt.checkpoints.base_model import BaseCheckpoint
    from lit_gpt.errors import UsageError
    from lit_gpt.generation.answer import answer, lora_paths, read_prompt
    from lit_gpt.generation.engine import dtype_of
    from lit_gpt.hardware import default_device
    from lit_gpt.methods import finetuned_model, lora
    from lit_gpt.methods.multi_lora import LoRAPool
    from lit_gpt.quantization.modules import is_quantized
    from lit_gpt.text.prompt_style import PromptStyle
    from lit_gpt.text.tokenizer import Tokenizer

    prompt, tokenizer = read_prompt(hp), Tokenizer(hp.checkpoint_dir)
    place = {"dtype": dtype_of(hp), "device": default_device()}
    if any(paths := lora_paths(prompt)):
        if hp.merge:
            raise UsageError(f"--merge true: lines of {hp.prompt_file} have a LoRA of their own; leave it out")
        style, base = (
            PromptStyle.from_checkpoint(hp.checkpoint_dir, tokenizer),
            BaseCheckpoint.of(hp.checkpoint_dir, hp.quantize),
        )
        loras = LoRAPool.beside(base, [path or hp.lora_path for path in paths], style, **place)
        return answer(hp, prompt, loras.model, tokenizer, style, loras)
    model, record = finetuned_model.load_finetuned(
        hp.checkpoint_dir, hp.lora_path, lora.NAME, **place, quantize=hp.quantize
    )
    if hp.merge or hp.merge is None and not is_quantized(model):
        lora.merge(model)
    answer(hp, prompt, model, tokenizer, PromptStyle.from_dict(record["prompt_style"]))


if __name__ == "__main__":
    run(main)
