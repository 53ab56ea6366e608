"""Convert a GGUF file to a checkpoint folder, as if downloaded from the hub and converted.

    python scripts/convert_gguf_checkpoint.py --gguf_path SmolLM2-135M-Instruct.Q4_1.gguf \\
        --out_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct

Quantized tensors are dequantized to `dtype`, one at a time. Configuration, tokenizer and chat template come from the
file's metadata; what cannot be taken over exactly is refused by name. --quantize keeps the weights in 8 or 4 bits of
our own, as scripts/quantize.py does with --rounding nearest.
"""

import shlex
from pathlib import Path
from typing import Literal

from lit_gpt.cli import Quantizer, run
from lit_gpt.errors import UsageError, UserError
from lit_gpt.files import check_new, refuse_folder

gguf_path: Path | None = None  # Read this file; merge the files of a model in several first.
out_dir: Path | None = None  # Write to this folder, which must not hold anything yet.
dtype: Literal["bf16", "fp16", "fp32"] = "bf16"  # Convert the weights to this.
quantize: Quantizer | None = None  # Keep the weights in fewer bits (null: all of them in `dtype`).


def main() -> None:
    if gguf_path is None:
        raise UsageError("--gguf_path: expected a path")
    if out_dir is None:
        raise UsageError("--out_dir: expected a path")
    refuse_folder(gguf_path, "a GGUF file", "*.gguf")
    if not gguf_path.is_file():
        raise UserError(f"--gguf_path {gguf_path}: no such file")
    check_new(out_dir)
    from lit_gpt import hardware
    from lit_gpt.conversion.gguf import importer

    importer.convert(gguf_path, out_dir, hardware.DTYPES[dtype], quantize)
    print(f"converted {gguf_path} to {out_dir}; next:")
    folder_name = shlex.quote(str(out_dir))
    print(f"  python scripts/prepare_alpaca.py --checkpoint_dir {folder_name}")
    print(f'  python generate/base.py --checkpoint_dir {folder_name} --prompt "..."')


if __name__ == "__main__":
    run(main, aliases={"checkpoint_dir": "out_dir"})
