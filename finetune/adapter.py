"""Finetune a converted checkpoint with Adapter.

    python finetune/adapter.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --data_dir data/alpaca \\
        --out_dir out/adapter/alpaca

Writes lit_model_adapter_finetuned.pth (the prompts and gates alone), metrics.csv, summary.json,
hyperparameters.json and loss.png.
The flags of lit_gpt/training/args.py are taken besides those below; --help explains all of them.
"""

from pathlib import Path

from lit_gpt.cli import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, run
from lit_gpt.methods.hyperparameters import AdapterConfig
from lit_gpt.training.args import ALIASES, TrainArgs
from lit_gpt.training.checks import check_early

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")
data_dir: Path = Path("data/alpaca")
out_dir: Path = Path("out/adapter/alpaca")
# Adapter
adapter_prompt_length: PositiveInt = 10
adapter_start_layer: NonNegativeInt = 2
# optimization
learning_rate: PositiveFloat = 9e-3
weight_decay: NonNegativeFloat = 0.02
warmup_steps: NonNegativeInt | None = None
epochs: PositiveFloat = 1
batch_size: PositiveInt = 128


def main(config: AdapterConfig, args: TrainArgs) -> None:
    check_early(args, "adapter", config)
    from lit_gpt.methods.adapter import Adapter
    from lit_gpt.training.setup import finetune

    finetune(args, Adapter(config))


if __name__ == "__main__":
    run(main, aliases=ALIASES)
