"""Generate text from a checkpoint with LoRA weights.

    python generate/lora.py --checkpoint_dir checkpoints/tiiuae/falcon-7b \\
        --lora_path out/lora/alpaca/lit_model_lora_finetuned.pth --prompt "..."

The prompt is rendered in the style of the finetune. The text goes to stdout as it comes, speed and memory to stderr.
In a file of prompts a line may name a `lora_path` of its own; all are answered in one batch.
"""

from pathlib import Path

from lit_gpt.cli import NonNegativeFloat, PositiveInt, run
from lit_gpt.generation.args import ModelArgs, PromptArgs, SamplingArgs

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # Read the base from this converted folder.
lora_path: Path = Path("out/lora/alpaca/lit_model_lora_finetuned.pth")  # Attach what finetune/lora.py wrote.
merge: bool | None = None  # Fold LoRA into the weights when loading, dequantized (null: if they are not quantized).
prompt: str = ""
max_new_tokens: PositiveInt = 100
temperature: NonNegativeFloat = 0.8


def main(prompt: PromptArgs, sampling: SamplingArgs, model: ModelArgs) -> None:
    from lit_gpt.checkpoints.base_model import BaseCheckpoint
    from lit_gpt.errors import UsageError
    from lit_gpt.generation.answer import read_prompt
    from lit_gpt.generation.answerer import Answerer
    from lit_gpt.hardware import DTYPES, default_device
    from lit_gpt.methods import lora
    from lit_gpt.methods.finetuned_model import load_finetuned
    from lit_gpt.methods.multi_lora import LoRAPool
    from lit_gpt.quantization.modules import is_quantized
    from lit_gpt.text.prompt_style import PromptStyle
    from lit_gpt.text.tokenizer import Tokenizer

    own = {"checkpoint_dir": checkpoint_dir, "lora_path": lora_path, "merge": merge}
    prompts, tokenizer = read_prompt(prompt, sampling, model, **own), Tokenizer(checkpoint_dir)
    device = {"dtype": DTYPES[model.precision], "device": default_device()}
    if any(paths := prompts.lora_paths):
        if merge:
            raise UsageError(f"--merge true: lines of {prompt.prompt_file} have a LoRA of their own; leave it out")
        base = BaseCheckpoint.open(checkpoint_dir, model.quantize)
        style = base.prompt_style
        loras = LoRAPool.beside(base, [path or lora_path for path in paths], style, **device)
        return prompts.answer(Answerer(loras.model, tokenizer, style, sampling, model.compile, loras, lora_path))
    gpt, record = load_finetuned(checkpoint_dir, lora_path, lora.NAME, **device, quantize=model.quantize)
    if merge or merge is None and not is_quantized(gpt):
        lora.merge(gpt)
    style = PromptStyle.from_dict(record["prompt_style"])
    return prompts.answer(Answerer(gpt, tokenizer, style, sampling, model.compile))


if __name__ == "__main__":
    run(main)
