"""Make one LoRA of several of the same base: a weighted sum, or what TIES or DARE keep of them.

    python scripts/combine_loras.py --checkpoint_dir checkpoints/tiiuae/falcon-7b \\
        --loras out/lora/a/lit_model_lora_finetuned.pth=0.7 out/lora/b/lit_model_lora_finetuned.pth=0.3 \\
        --out_dir out/lora/both

A weight may be negative, which takes away what was learned; without one it is 1. The sum is exact, and its rank that of
all together; --lora_r brings it down to fewer. Writes lit_model_lora_finetuned.pth, in the prompt style of the first.
"""

from pathlib import Path
from typing import Literal

from lit_gpt.checkpoints.folder import check_inputs
from lit_gpt.cli import NonNegativeInt, PositiveFloat, PositiveInt, run
from lit_gpt.errors import UsageError, UserError
from lit_gpt.files import check_new

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # Read the base from this converted folder.
loras: list[str] = []  # Combine these files, two or more, each given as FILE or FILE=WEIGHT.
out_dir: Path | None = None  # Write to this folder, which must not hold anything yet.
how: Literal["sum", "ties", "dare"] = "sum"  # Add them, by TIES (largest entries of one sign) or DARE (random ones).
lora_r: PositiveInt | None = None  # Give the result this rank (null: of a sum as many as are exact, else the largest).
density: PositiveFloat | None = None  # Keep this share of entries, where how is ties or dare (null: 0.2).
seed: NonNegativeInt = 1234  # Draw the entries that dare keeps by this.


def main() -> None:
    if out_dir is None:
        raise UsageError("--out_dir: expected a folder to write to")
    if density and how == "sum":
        raise UsageError(
            f"--density {density} with --how sum: a sum keeps all entries; leave it out, or give ties or dare"
        )
    if density and density > 1:
        raise UsageError(f"--density {density}: expected a share of at most 1")
    files = weighted_files(loras)
    for path in files:
        check_inputs(checkpoint_dir, path, "lora", flag="--loras")
    check_new(out_dir)
    from dataclasses import asdict

    import torch

    from lit_gpt.checkpoints.base_model import BaseCheckpoint
    from lit_gpt.files import new_folder
    from lit_gpt.methods.finetuned_file import read_file, save_file
    from lit_gpt.methods.finetuned_model import method_of
    from lit_gpt.methods.lora import NAME
    from lit_gpt.methods.lora.combining import Ingredient, combine

    base = BaseCheckpoint.open(checkpoint_dir)
    records = {path: read_file(path, NAME, base.fingerprint) for path in files}
    first = records[next(iter(files))]
    for path, record in records.items():
        if record.get("quantize") != first.get("quantize"):
            raise UserError(f"{path}: trained on another quantization of the base than the first; combine its like")
        if record["prompt_style"] != first["prompt_style"]:
            print(f"{path}: trained in another prompt style than the first, which the result has")
    parts = [Ingredient(p, w, method_of(records[p], p).config, records[p]["state"]) for p, w in files.items()]
    config, state = combine(base.config, parts, how, lora_r, density or 0.2, torch.Generator().manual_seed(seed))
    record = {"hyperparameters": asdict(config), "prompt_style": first["prompt_style"]}
    with new_folder(out_dir) as folder:
        path = folder / "lit_model_lora_finetuned.pth"
        save_file(path, NAME, base.fingerprint, state, **record, quantize=first.get("quantize"))
    print(f"wrote {out_dir / 'lit_model_lora_finetuned.pth'}: rank {config.r}, of {len(files)} LoRAs")


def weighted_files(arguments: list[str]) -> dict[Path, float]:
    """Return {file: weight} of arguments FILE or FILE=WEIGHT."""
    files: dict[Path, float] = {}
    for argument in arguments:
        name, _, weight = argument.rpartition("=")
        try:
            path, factor = (Path(name), float(weight)) if name else (Path(argument), 1.0)
        except ValueError:
            raise UsageError(f"--loras {argument}: expected FILE or FILE=WEIGHT, such as a.pth=0.5") from None
        if path.expanduser() in files:
            raise UsageError(f"--loras {argument}: the file comes twice; add its weights")
        files[path.expanduser()] = factor
    if len(files) < 2:
        raise UsageError("--loras: expected two files or more, each as FILE or FILE=WEIGHT")
    return files


if __name__ == "__main__":
    run(main)
