"""Write a converted checkpoint with its weights in fewer bits, to generate from or to finetune beside.

    python scripts/quantize.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --quantize nf4 \\
        --out_dir checkpoints/tiiuae/falcon-7b-nf4

4 bits are calibrated (GPTQ): rounded so that what the blocks give for some text changes least. The text is that of
--calibration_path or, if none is given, the model's own. int8, which loses nothing to speak of, is rounded to the
nearest, and with --rounding nearest so are 4 bits: that is what --quantize of the other scripts makes each time anew.

With --lora_r the weights are rounded together with a LoRA that makes up for what they lose (LoftQ; with --lora_start
svd QPiSSA). It lies beside them, and finetuning starts from it:

    python scripts/quantize.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --quantize nf4 --lora_r 64 \\
        --out_dir checkpoints/tiiuae/falcon-7b-loftq
"""

from pathlib import Path
from typing import Literal

from lit_gpt.checkpoints.folder import check_inputs
from lit_gpt.cli import PositiveInt, Quantizer, run
from lit_gpt.errors import UsageError
from lit_gpt.files import check_new

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # Quantize this converted folder.
out_dir: Path | None = None  # Write to this folder, which must not hold anything yet.
quantize: Quantizer = "nf4"  # Scale each output channel (int8) or 64 weights (others; nf4-dq in 8 bits).

rounding: Literal["calibrated", "nearest"] | None = None  # Round so (null: calibrated, but int8 to the nearest).
calibration_path: Path | None = None  # Calibrate on this text, rows or prepared folder (null: on the model's own text).
calibration_tokens: PositiveInt = 8192  # Calibrate on this many tokens.
# a LoRA that makes up for the rounding, of all linear layers but the head
lora_r: PositiveInt | None = None  # Give it this rank, and write its file too (null: none).
lora_start: Literal["quantize", "svd"] | None = (
    None  # Round first (null, LoftQ), or split off the largest part (QPiSSA).
)
lora_iterations: PositiveInt | None = None  # Round and approximate so often (null: 5); each layer keeps the best.


def main() -> None:
    if out_dir is None:
        raise UsageError("--out_dir: expected a folder to write to")
    chosen = rounding or ("nearest" if quantize == "int8" or lora_r else "calibrated")
    for name, value in {"start": lora_start, "iterations": lora_iterations}.items():
        if value and not lora_r:
            raise UsageError(f"--lora_{name} {value}: goes with --lora_r, the rank of a LoRA; give both or none")
    if lora_r and chosen == "calibrated":
        raise UsageError(f"--lora_r {lora_r} with --rounding calibrated: its LoRA goes with the nearest; leave one out")
    if quantize == "int8" and chosen == "calibrated":
        raise UsageError("--rounding calibrated: is for 4 bits; int8 loses nothing by --rounding nearest")
    if calibration_path and chosen == "nearest":
        raise UsageError("--calibration_path: is not used by --rounding nearest, nor by int8; leave it out")
    check_inputs(checkpoint_dir)
    check_new(out_dir)
    from lit_gpt import files
    from lit_gpt.checkpoints.base_model import BaseCheckpoint
    from lit_gpt.conversion import calibration, hf
    from lit_gpt.methods.lora.decomposition import Decomposition
    from lit_gpt.text.prompt_style import FILE

    base, calibrated = BaseCheckpoint.open(checkpoint_dir, quantize), chosen == "calibrated"
    parts = Decomposition(base, lora_r, lora_iterations or 5, lora_start or "quantize") if lora_r else None
    # before there is a file
    text = calibration.given_text(calibration_path, calibration_tokens, base) if calibrated else None
    with files.new_folder(out_dir) as folder:
        rounded = calibration.tensors(base, text, calibration_tokens) if calibrated else base.quantized(base.dtype)
        rounded = parts.tensors() if parts else rounded
        base.write_quantized(folder, rounded, own_codes=calibrated or parts is not None)
        (folder / "lit_config.json").write_text(base.config.to_json())
        hf.copy_side_files(checkpoint_dir, folder, (*hf.CHECKPOINT_FILES, FILE))
        if parts:
            parts.write_lora(folder)
        sizes = [(path / "lit_model.pth").stat().st_size / 1e9 for path in (checkpoint_dir, folder)]
    print(f"wrote {out_dir}: {sizes[1]:.2f} GB in place of {sizes[0]:.2f} GB")
    if parts:
        path = out_dir / "lit_model_lora_finetuned.pth"
        print(f"wrote {path}: with it the weights are off by {parts.share:.0%} of what rounding alone loses; next:")
        print(f"  python finetune/lora.py --checkpoint_dir {out_dir} --finetuned_path {path} {parts.flags} ...")


if __name__ == "__main__":
    run(main)
