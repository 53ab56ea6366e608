"""Finetune a converted checkpoint with Adapter v2.

    python finetune/adapter_v2.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --data_dir data/alpaca \\
        --out_dir out/adapter_v2/alpaca

Writes lit_model_adapter_v2_finetuned.pth (the prompts, gates, scales, biases and norms alone), metrics.csv,
summary.json, hyperparameters.json and loss.png.
The flags of lit_gpt/training/args.py are taken besides those below; --help explains all of them.
"""

from pathlib import Path

from lit_gpt.cli import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, run
from lit_gpt.methods.hyperparameters import AdapterConfig
from lit_gpt.training.args import ALIASES, TrainArgs
from lit_gpt.training.checks import check_early

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")
data_dir: Path = Path("data/alpaca")
out_dir: Path = Path("out/adapter_v2/alpaca")
# Adapter v2
adapter_prompt_length: PositiveInt = 10
adapter_start_layer: NonNegativeInt = 2
# optimization
learning_rate: PositiveFloat = 9e-3
weight_decay: NonNegativeFloat = 0.02
warmup_steps: NonNegativeInt | None = None
epochs: PositiveFloat = 1
batch_size: PositiveInt = 128


def main(config: AdapterConfig, args: TrainArgs) -> None:
    check_early(args, "adapter_v2", config)
    from lit_gpt.methods.adapter_v2 import AdapterV2
    from lit_gpt.training.setup import finetune

    finetune(args, AdapterV2(config))


if __name__ == "__main__":
    run(main, aliases=ALIASES)
