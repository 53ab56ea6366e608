"""Finetune a converted checkpoint with bottleneck adapters: Houlsby's, Pfeiffer's, parallel ones, AdapterDrop.

    python finetune/bottleneck.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --data_dir data/alpaca \\
        --out_dir out/bottleneck/alpaca

Writes lit_model_bottleneck_finetuned.pth (the bottlenecks alone), metrics.csv, summary.json,
hyperparameters.json and loss.png. generate/finetuned.py answers with it.
The flags of lit_gpt/training/args.py are taken besides those below; --help explains all of them.
"""

from pathlib import Path
from typing import Literal

from lit_gpt.cli import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, run
from lit_gpt.methods.hyperparameters import BottleneckConfig
from lit_gpt.training.args import ALIASES, TrainArgs
from lit_gpt.training.checks import check_early

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")
data_dir: Path = Path("data/alpaca")
out_dir: Path = Path("out/bottleneck/alpaca")
# bottlenecks: after attention and MLP (Houlsby), after the MLP (Pfeiffer), or beside it
bottleneck_size: PositiveInt = 64
bottleneck_place: Literal["both", "mlp", "parallel"] = "both"
bottleneck_start_layer: NonNegativeInt = 0
bottleneck_drop: NonNegativeInt = 0
# optimization
learning_rate: PositiveFloat = 1e-3
weight_decay: NonNegativeFloat = 0.0
warmup_steps: NonNegativeInt | None = None
epochs: PositiveFloat = 1
batch_size: PositiveInt = 128


def main(config: BottleneckConfig, args: TrainArgs) -> None:
    check_early(args, "bottleneck", config)
    from lit_gpt.methods.bottleneck import Bottlenecks
    from lit_gpt.training.setup import finetune

    finetune(args, Bottlenecks(config))


if __name__ == "__main__":
    run(main, aliases=ALIASES)
