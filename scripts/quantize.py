"""Write a converted checkpoint with its weights in fewer bits, to generate from or to finetune beside.

    python scripts/quantize.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --quantize nf4 \\
        --out_dir checkpoints/tiiuae/falcon-7b-nf4

4 bits are calibrated (GPTQ): rounded so that what the blocks give for some text changes least. The text is that of
--calibration_path or, if none is given, the model's own. int8, which loses nothing to speak of, is rounded to the
nearest, and with --rounding nearest so are 4 bits: that is what --quantize of the other scripts makes each time anew.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from lit_gpt.cli import PositiveInt, Quantizer, run
from lit_gpt.errors import UsageError

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # converted folder
out_dir: Path | None = None  # where to write; must not hold anything yet
quantize: Quantizer = "nf4"  # int8: a scale per output channel; int4, nf4: per 64 weights; nf4-dq: these in 8 bits

rounding: Literal["calibrated", "nearest"] | None = None  # null: calibrated, but int8 to the nearest
calibration_path: Path | None = None  # text, rows (.jsonl and so on) or a prepared folder (null: the model's own text)
calibration_tokens: PositiveInt = 8192  # of it


def main(hp: SimpleNamespace) -> None:
    if hp.out_dir is None:
        raise UsageError("--out_dir: expected a folder to write to")
    rounding = hp.rounding or ("nearest" if hp.quantize == "int8" else "calibrated")
    if hp.quantize == "int8" and rounding == "calibrated":
        raise UsageError("--rounding calibrated: is for 4 bits; int8 loses nothing by --rounding nearest")
    if hp.calibration_path and rounding == "nearest":
        raise UsageError("--calibration_path: is not used by --rounding nearest, nor by int8; leave it out")
    from lit_gpt import files
    from lit_gpt.checkpoints.base_model import BaseCheckpoint
    from lit_gpt.conversion import calibration, hf
    from lit_gpt.text.prompt_style import FILE

    base, calibrated = BaseCheckpoint.of(hp.checkpoint_dir, hp.quantize), rounding == "calibrated"
    text = calibration.given_text(hp, base) if calibrated else None  # before there is a file
    with files.new_folder(hp.out_dir) as folder:
        tensors = calibrated_tensors(hp, base, text) if calibrated else base.quantized(base.dtype)
        base.write_quantized(folder, tensors, calibrated)
        (folder / "lit_config.json").write_text(base.config.to_json())
        hf.copy_side_files(hp.checkpoint_dir, folder)
        if (hp.checkpoint_dir / FILE).exists():  # of a finetune
            shutil.copyfile(hp.checkpoint_dir / FILE, folder / FILE)
        sizes = [(path / "lit_model.pth").stat().st_size / 1e9 for path in (hp.checkpoint_dir, folder)]
    print(f"wrote {hp.out_dir}: {sizes[1]:.2f} GB in place of {sizes[0]:.2f} GB")


def calibrated_tensors(hp: SimpleNamespace, base: Any, text: Any) -> Iterator[tuple[str, Any]]:
    """Of what is written piece by piece: the model's own text takes long, and comes once there is room on the disk."""
    from lit_gpt.conversion import calibration
    from lit_gpt.hardware import default_device

    device = default_device()
    ids = calibration.own_text(base, hp.calibration_tokens, device) if text is None else text.to(device)
    yield from calibration.calibrated(base, ids, base.dtype)


if __name__ == "__main__":
    run(main)
