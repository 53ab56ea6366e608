"""Finetune a converted checkpoint with IA3.

    python finetune/ia3.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --data_dir data/alpaca \\
        --out_dir out/ia3/alpaca

Writes lit_model_ia3_finetuned.pth (the factors alone), metrics.csv, summary.json, hyperparameters.json and loss.png.
The flags of lit_gpt/training/args.py are taken besides those below; --help explains all of them.
"""

from pathlib import Path

from lit_gpt.cli import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, run
from lit_gpt.methods.hyperparameters import IA3Config
from lit_gpt.training.args import ALIASES, TrainArgs
from lit_gpt.training.checks import check_early

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")
data_dir: Path = Path("data/alpaca")
out_dir: Path = Path("out/ia3/alpaca")
# IA3
ia3_key: bool = True
ia3_value: bool = True
ia3_mlp: bool = True
# optimization
learning_rate: PositiveFloat = 3e-3
weight_decay: NonNegativeFloat = 0.0  # which would draw factors to 0, and they begin at 1
warmup_steps: NonNegativeInt | None = None
epochs: PositiveFloat = 1
batch_size: PositiveInt = 128


def main(config: IA3Config, args: TrainArgs) -> None:
    check_early(args, "ia3", config)
    from lit_gpt.methods.ia3 import IA3
    from lit_gpt.training.setup import finetune

    finetune(args, IA3(config))


if __name__ == "__main__":
    run(main, aliases=ALIASES)
