"""Generate text from what finetune/full.py wrote, or any other checkpoint folder, in the style that it was trained in.

    python generate/full.py --checkpoint_dir out/full/alpaca --prompt "..."

The text goes to stdout as it comes; speed and memory go to stderr.
"""

from pathlib import Path

from lit_gpt.checkpoints.folder import check_inputs
from lit_gpt.cli import NonNegativeFloat, PositiveInt, run
from lit_gpt.generation.args import ModelArgs, PromptArgs, SamplingArgs

checkpoint_dir: Path = Path("out/full/alpaca")  # Read what finetune/full.py wrote.
prompt: str = ""
max_new_tokens: PositiveInt = 100
temperature: NonNegativeFloat = 0.8


def main(prompt: PromptArgs, sampling: SamplingArgs, model: ModelArgs) -> None:
    check_inputs(checkpoint_dir)
    from lit_gpt.checkpoints.base_model import BaseCheckpoint
    from lit_gpt.distributed.placement import place
    from lit_gpt.generation.answer import read_prompt
    from lit_gpt.generation.answerer import Answerer
    from lit_gpt.hardware import DTYPES

    prompts = read_prompt(prompt, sampling, model, checkpoint_dir=checkpoint_dir)
    base = BaseCheckpoint.open(checkpoint_dir, model.quantize, resident=True)
    gpt = base.build(DTYPES[model.precision], place(model.device, model.devices))
    prompts.answer(Answerer(gpt, base.tokenizer, base.prompt_style, sampling, model.compile))


if __name__ == "__main__":
    run(main)
