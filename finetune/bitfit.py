"""Finetune a converted checkpoint with BitFit: its biases alone, those of norms included.

    python finetune/bitfit.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --data_dir data/alpaca \\
        --out_dir out/bitfit/alpaca

Writes lit_model_bitfit_finetuned.pth (what was trained), metrics.csv, summary.json, hyperparameters.json and loss.png.
The flags of lit_gpt/training/args.py are taken besides those below; --help explains all of them.
"""

from pathlib import Path

from lit_gpt.cli import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, run
from lit_gpt.methods.hyperparameters import BitFitConfig
from lit_gpt.training.args import ALIASES, TrainArgs
from lit_gpt.training.checks import check_early

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")
data_dir: Path = Path("data/alpaca")
out_dir: Path = Path("out/bitfit/alpaca")
# optimization
learning_rate: PositiveFloat = 1e-3
weight_decay: NonNegativeFloat = 0.0
warmup_steps: NonNegativeInt | None = None
epochs: PositiveFloat = 1
batch_size: PositiveInt = 128


def main(config: BitFitConfig, args: TrainArgs) -> None:
    check_early(args, "bitfit", config)
    from lit_gpt.methods.parts import BitFit
    from lit_gpt.training.setup import finetune

    finetune(args, BitFit(config))


if __name__ == "__main__":
    run(main, aliases=ALIASES)
