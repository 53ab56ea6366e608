"""Finetune a converted checkpoint with a learned prompt: prompt tuning, P-tuning or prefix tuning.

    python finetune/prompt.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --data_dir data/alpaca \\
        --out_dir out/prompt/alpaca

Writes lit_model_prompt_finetuned.pth (the vectors and their encoder alone), metrics.csv, summary.json,
hyperparameters.json and loss.png. generate/finetuned.py answers with it.
The flags of lit_gpt/training/args.py are taken besides those below; --help explains all of them.
"""

from pathlib import Path
from typing import Literal

from lit_gpt.cli import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, run
from lit_gpt.methods.hyperparameters import PromptConfig
from lit_gpt.training.args import ALIASES, TrainArgs
from lit_gpt.training.checks import check_early

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")
data_dir: Path = Path("data/alpaca")
out_dir: Path = Path("out/prompt/alpaca")
# the prompt: embeddings (with an encoder, P-tuning), or keys and values (prefix tuning)
prompt_kind: Literal["embeddings", "keys_values"] = "embeddings"
prompt_length: PositiveInt = 20
prompt_encoder: Literal["none", "mlp", "lstm"] = "none"
prompt_init: Literal["vocabulary", "text", "random"] | None = None
# optimization
learning_rate: PositiveFloat = 1e-2
weight_decay: NonNegativeFloat = 0.0
warmup_steps: NonNegativeInt | None = None
epochs: PositiveFloat = 1
batch_size: PositiveInt = 128


def main(config: PromptConfig, args: TrainArgs) -> None:
    check_early(args, "prompt", config)
    from lit_gpt.methods.prompt import Prompt
    from lit_gpt.training.setup import finetune

    finetune(args, Prompt(config))


if __name__ == "__main__":
    run(main, aliases=ALIASES)
