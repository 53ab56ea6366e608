"""Write a converted checkpoint with its weights in fewer bits, to generate from or to finetune beside.

    python scripts/quantize.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --quantize nf4 \\
        --out_dir checkpoints/tiiuae/falcon-7b-nf4

4 bits are calibrated (GPTQ): rounded so that what the blocks give for some text changes least. The text is that of
--calibration_path or, if none is given, the model's own. int8, which loses nothing to speak of, is rounded to the
nearest, and with --rounding nearest so are 4 bits: that is what --quantize of the other scripts makes each time anew.
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


def main() -> None:
    if out_dir is None:
        raise UsageError("--out_dir: expected a folder to write to")
    chosen = rounding or ("nearest" if quantize == "int8" else "calibrated")
    if quantize == "int8" and chosen == "calibrated":
        raise UsageError("--rounding calibrated: is for 4 bits; int8 loses nothing by --rounding nearest")
    if calibration_path and chosen == "nearest":
        raise UsageError("--calibration_path: is not used by --rounding nearest, nor by int8; leave it out")
    check_inputs(checkpoint_dir)
    check_new(out_dir)
    from lit_gpt import files
    from lit_gpt.checkpoints.base_model import BaseCheckpoint
    from lit_gpt.conversion import calibration, hf
    from lit_gpt.text.prompt_style import FILE

    base, calibrated = BaseCheckpoint.open(checkpoint_dir, quantize), chosen == "calibrated"
    # before there is a file
    text = calibration.given_text(calibration_path, calibration_tokens, base) if calibrated else None
    with files.new_folder(out_dir) as folder:
        rounded = calibration.tensors(base, text, calibration_tokens) if calibrated else base.quantized(base.dtype)
        base.write_quantized(folder, rounded, calibrated)
        (folder / "lit_config.json").write_text(base.config.to_json())
        hf.copy_side_files(checkpoint_dir, folder, (*hf.CHECKPOINT_FILES, FILE))
        sizes = [(path / "lit_model.pth").stat().st_size / 1e9 for path in (checkpoint_dir, folder)]
    print(f"wrote {out_dir}: {sizes[1]:.2f} GB in place of {sizes[0]:.2f} GB")


if __name__ == "__main__":
    run(main)
