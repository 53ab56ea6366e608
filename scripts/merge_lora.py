"""Fold what LoRA, IA3 or BitFit trained into its base: a complete checkpoint folder, to use or export as any other.

    python scripts/merge_lora.py --checkpoint_dir checkpoints/tiiuae/falcon-7b \\
        --finetuned_path out/lora/alpaca/lit_model_lora_finetuned.pth --out_dir out/falcon-7b-alpaca

Merges in fp32, one tensor at a time, and compares the logits with the unmerged model's before anything is put in
place. A model card goes along, and export.json with the figures. What was trained on a quantized base is merged into
the dequantized one, and the result is not quantized, unless only zero points of int4 were trained (--lora_update qa).
"""

from pathlib import Path
from typing import Literal

from lit_gpt.checkpoints.folder import check_inputs
from lit_gpt.cli import run
from lit_gpt.errors import UsageError
from lit_gpt.files import check_new

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # Read the base, or a quantized one.
finetuned_path: Path = Path("out/lora/alpaca/lit_model_lora_finetuned.pth")  # Fold in this.
out_dir: Path | None = None  # Write to this folder, which must not hold anything yet.
dtype: Literal["bf16", "fp16", "fp32"] | None = None  # Store the weights so (null: as the base's; fp32 rounds nothing).


def main() -> None:
    if out_dir is None:
        raise UsageError("--out_dir: expected a folder to write to")
    check_inputs(checkpoint_dir, finetuned_path)
    check_new(out_dir)
    from lit_gpt import hardware
    from lit_gpt.conversion import export

    off = export.merge(checkpoint_dir, finetuned_path, out_dir, hardware.DTYPES.get(dtype))
    print(f"wrote {out_dir}; its logits differ from the unmerged model's by {off:.1e} of their norm")


if __name__ == "__main__":
    run(main, aliases={"lora_path": "finetuned_path"})  # spelling of before
