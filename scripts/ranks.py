"""Share out LoRA's ranks among the layers by how their inputs vary (EVA), and write them as flags of finetune/lora.py.

    python scripts/ranks.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --data_dir data/alpaca --out ranks.yaml
    python finetune/lora.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --data_dir data/alpaca \\
        --out_dir out/lora/eva --config ranks.yaml

There are as many ranks as with --lora_r for all. Each goes to the layer whose next direction explains the largest share
of the variance of its inputs, on a packed row of the training data. The file is for reading and editing, too.
"""

import re
from pathlib import Path

import yaml

from lit_gpt.checkpoints.folder import check_inputs
from lit_gpt.cli import PositiveFloat, Quantizer, flag_values, run
from lit_gpt.data.folder import read_record
from lit_gpt.errors import UsageError
from lit_gpt.files import check_out_file
from lit_gpt.methods.hyperparameters import LoRAConfig

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # Read the base from this converted folder.
data_dir: Path = Path("data/alpaca")  # Read prepared data, from one of the prepare scripts.
out: Path = Path("ranks.yaml")  # Write to this file, for --config of finetune/lora.py.
rho: PositiveFloat = 2.0  # Give a layer at most this many times --lora_r.
quantize: Quantizer | None = None  # Keep the base's weights in fewer bits, as the finetune will (null: as stored).
lora_init: str = "eva"  # Start A from these directions, in the finetune.


def main(config: LoRAConfig) -> None:
    if rho < 1:
        raise UsageError(f"--rho {rho:g}: expected at least 1, by which all layers keep --lora_r")
    if config.ranks:
        raise UsageError("--lora_ranks: are what is looked for; leave it out")
    check_inputs(checkpoint_dir)
    check_out_file(out)
    read_record(data_dir)
    import torch

    from lit_gpt.checkpoints.base_model import BaseCheckpoint
    from lit_gpt.data.dataset import read_meta
    from lit_gpt.files import atomic
    from lit_gpt.methods.lora import attach, explained_ranks
    from lit_gpt.training.objectives import make_objective
    from lit_gpt.training.setup import start_of

    base = BaseCheckpoint.open(checkpoint_dir, quantize)
    read_meta(data_dir, base.tokenizer)
    objective = make_objective("sft")
    train, _ = objective.datasets(data_dir)
    start = start_of(base, train, objective, torch.device("cpu"))
    ranks = explained_ranks(attach(base.build(), config), config, start, rho)
    plain = flag_values(LoRAConfig())
    flags = {name: value for name, value in flag_values(config).items() if value != plain[name]}
    flags |= {"lora_r": config.r, "lora_ranks": {f"^{re.escape(path)}$": rank for path, rank in ranks.items()}}
    with atomic(out) as temporary:
        temporary.write_text(yaml.safe_dump(flags, sort_keys=False), encoding="utf-8")
    print(f"wrote {out}: ranks from {min(ranks.values())} to {max(ranks.values())} in {len(ranks)} layers")


if __name__ == "__main__":
    run(main)
