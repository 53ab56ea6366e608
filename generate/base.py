"""Generate text from a converted checkpoint.

    python generate/base.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --prompt "Hello, my name is"

The text goes to stdout as it comes; speed and memory go to stderr.
"""

from pathlib import Path

from lit_gpt.checkpoints.folder import check_inputs
from lit_gpt.cli import NonNegativeFloat, PositiveInt, run
from lit_gpt.generation.args import ModelArgs, PromptArgs, SamplingArgs

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # Read the model from this converted folder.
prompt: str = ""
prompt_style: str | None = None  # Render in this style: alpaca, chatml, plain, a Jinja file (null: the checkpoint's).
max_new_tokens: PositiveInt = 50
temperature: NonNegativeFloat = 0.8


def main(prompt: PromptArgs, sampling: SamplingArgs, model: ModelArgs) -> None:
    check_inputs(checkpoint_dir)
    from lit_gpt.checkpoints.base_model import BaseCheckpoint
    from lit_gpt.distributed.placement import place
    from lit_gpt.generation.answer import read_prompt
    from lit_gpt.generation.answerer import Answerer
    from lit_gpt.hardware import DTYPES
    from lit_gpt.methods.multi_lora import LoRAPool
    from lit_gpt.text.prompt_style import PromptStyle

    prompts = read_prompt(prompt, sampling, model, checkpoint_dir=checkpoint_dir, prompt_style=prompt_style)
    base = BaseCheckpoint.open(checkpoint_dir, model.quantize, resident=True)
    style = PromptStyle.from_name(prompt_style, base.tokenizer) if prompt_style else base.prompt_style
    device = {"dtype": DTYPES[model.precision], "device": place(model.device, model.devices)}
    loras = LoRAPool.beside(base, prompts.lora_paths, style, fixed=bool(prompt_style), **device)
    prompts.answer(Answerer(loras.model, base.tokenizer, style, sampling, model.compile, loras))


if __name__ == "__main__":
    run(main)
