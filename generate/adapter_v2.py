"""Generate text from a checkpoint with Adapter v2 weights.

    python generate/adapter_v2.py --checkpoint_dir checkpoints/tiiuae/falcon-7b \\
        --finetuned_path out/adapter_v2/alpaca/lit_model_adapter_v2_finetuned.pth --prompt "..."

The prompt is rendered in the style of the finetune. The text goes to stdout as it comes, speed and memory to stderr.
"""

from pathlib import Path

from lit_gpt.checkpoints.folder import check_inputs
from lit_gpt.cli import NonNegativeFloat, PositiveInt, run
from lit_gpt.generation.args import ModelArgs, PromptArgs, SamplingArgs

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # Read the base from this converted folder.
finetuned_path: Path = Path("out/adapter_v2/alpaca/lit_model_adapter_v2_finetuned.pth")  # Attach this.
prompt: str = ""
max_new_tokens: PositiveInt = 100
temperature: NonNegativeFloat = 0.8


def main(prompt: PromptArgs, sampling: SamplingArgs, model: ModelArgs) -> None:
    check_inputs(checkpoint_dir, finetuned_path, "adapter_v2")
    from lit_gpt.generation.answer import answer_finetuned

    answer_finetuned(checkpoint_dir, finetuned_path, "adapter_v2", prompt, sampling, model)


if __name__ == "__main__":
    run(main, aliases={"adapter_path": "finetuned_path"})  # spelling of before
