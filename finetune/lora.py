"""Finetune a converted checkpoint with LoRA.

    python finetune/lora.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --data_dir data/alpaca \\
        --out_dir out/lora/alpaca

Writes lit_model_lora_finetuned.pth (the LoRA weights alone), metrics.csv, summary.json, hyperparameters.json, loss.png.
The flags of lit_gpt/training/args.py are taken besides those below; --help explains all of them.
"""

from pathlib import Path

from lit_gpt.cli import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, run
from lit_gpt.methods.hyperparameters import LoRAConfig
from lit_gpt.training.args import ALIASES, TrainArgs
from lit_gpt.training.checks import check_early

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")
data_dir: Path = Path("data/alpaca")
out_dir: Path = Path("out/lora/alpaca")
# LoRA: update each chosen projection by (lora_alpha / lora_r) B A
lora_r: PositiveInt = 8
lora_alpha: PositiveFloat = 16
lora_dropout: Fraction = 0.05
lora_query: bool = True
lora_key: bool = False
lora_value: bool = True
lora_projection: bool = False
lora_mlp: bool = False
lora_head: bool = False
# optimization
learning_rate: PositiveFloat = 3e-4
weight_decay: NonNegativeFloat = 0.01
warmup_steps: NonNegativeInt | None = None
epochs: PositiveFloat = 1
batch_size: PositiveInt = 128


def main(config: LoRAConfig, args: TrainArgs) -> None:
    check_early(args, "lora", config)
    from lit_gpt.methods.lora import LoRA
    from lit_gpt.training.setup import finetune

    finetune(args, LoRA(config))


if __name__ == "__main__":
    run(main, aliases=ALIASES)
