"""Finetune a converted checkpoint, all of its weights.

    python finetune/full.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --data_dir data/alpaca \\
        --out_dir out/full/alpaca

Writes a checkpoint folder like the base's, and into it metrics.csv, summary.json, hyperparameters.json and loss.png.
The flags of lit_gpt/training/args.py are taken besides those below; --help explains all of them.
"""

from pathlib import Path

from lit_gpt.cli import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, run
from lit_gpt.methods.hyperparameters import FullConfig
from lit_gpt.training.args import ALIASES, TrainArgs
from lit_gpt.training.checks import check_early

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")
data_dir: Path = Path("data/alpaca")
out_dir: Path = Path("out/full/alpaca")
# optimization
learning_rate: PositiveFloat = 2e-5
weight_decay: NonNegativeFloat = 0.01
warmup_steps: NonNegativeInt | None = None
epochs: PositiveFloat = 1
batch_size: PositiveInt = 128


def main(config: FullConfig, args: TrainArgs) -> None:
    check_early(args, "full", config)
    from lit_gpt.methods.full import Full
    from lit_gpt.training.setup import finetune

    finetune(args, Full(config))


if __name__ == "__main__":
    run(main, aliases=ALIASES)
