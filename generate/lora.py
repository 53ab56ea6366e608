"""Generate text from a checkpoint with LoRA weights.

    python generate/lora.py --checkpoint_dir checkpoints/tiiuae/falcon-7b \\
        --finetuned_path out/lora/alpaca/lit_model_lora_finetuned.pth --prompt "..."

The prompt is rendered in the style of the finetune. The text goes to stdout as it comes, speed and memory to stderr.
In a file of prompts a line may name a `lora_path` of its own; all are answered in one batch.
"""

from pathlib import Path

from lit_gpt.checkpoints.folder import check_inputs
from lit_gpt.cli import NonNegativeFloat, PositiveInt, run
from lit_gpt.generation.args import ModelArgs, PromptArgs, SamplingArgs

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # Read the base from this converted folder.
finetuned_path: Path = Path("out/lora/alpaca/lit_model_lora_finetuned.pth")  # Attach what finetune/lora.py wrote.
merge: bool | None = None  # Fold LoRA into the weights when loading, dequantized (null: if they are not quantized).
prompt: str = ""
max_new_tokens: PositiveInt = 100
temperature: NonNegativeFloat = 0.8


def main(prompt: PromptArgs, sampling: SamplingArgs, model: ModelArgs) -> None:
    check_inputs(checkpoint_dir, finetuned_path, "lora")
    from lit_gpt.checkpoints.base_model import BaseCheckpoint
    from lit_gpt.distributed.placement import place
    from lit_gpt.errors import UsageError
    from lit_gpt.generation.answer import read_prompt
    from lit_gpt.generation.answerer import Answerer
    from lit_gpt.hardware import DTYPES
    from lit_gpt.methods import lora
    from lit_gpt.methods.multi_lora import LoRAPool
    from lit_gpt.quantization.modules import is_quantized

    own = {"checkpoint_dir": checkpoint_dir, "lora_path": finetuned_path, "merge": merge}
    prompts = read_prompt(prompt, sampling, model, **own)
    if any(paths := prompts.lora_paths):
        if merge:
            raise UsageError(f"--merge true: lines of {prompt.prompt_file} have a LoRA of their own; leave it out")
        base = BaseCheckpoint.open(checkpoint_dir, model.quantize, resident=True)
        device = {"dtype": DTYPES[model.precision], "device": place(model.device, model.devices)}
        style, files = base.prompt_style, [path or finetuned_path for path in paths]
        loras = LoRAPool.beside(base, files, style, **device)
        return prompts.answer(
            Answerer(loras.model, base.tokenizer, style, sampling, model.compile, loras, finetuned_path)
        )
    answerer = Answerer.from_finetuned(checkpoint_dir, finetuned_path, lora.NAME, sampling, model)
    if merge or merge is None and not is_quantized(answerer.model):
        lora.merge(answerer.model)
    return prompts.answer(answerer)


if __name__ == "__main__":
    run(main, aliases={"lora_path": "finetuned_path"})  # spelling of before
