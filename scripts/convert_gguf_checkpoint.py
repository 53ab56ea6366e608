"""Convert a GGUF file of the Llama family to a checkpoint folder, as if downloaded from the hub and converted.

    python scripts/convert_gguf_checkpoint.py --gguf_path SmolLM2-135M-Instruct.Q4_1.gguf \\
        --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct

Quantized tensors are widened to `dtype`, one at a time. Configuration, tokenizer and chat template come from the
file's metadata; what cannot be taken over exactly is refused by name.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from lit_gpt.cli import run
from lit_gpt.errors import UsageError

gguf_path: Path | None = None  # the file; of a model in several files, merge them first
checkpoint_dir: Path | None = None  # folder to write; must not hold anything yet
dtype: Literal["bf16", "fp16", "fp32"] = "bf16"  # of the converted weights


def main(hp: SimpleNamespace) -> None:
    for flag in ("gguf_path", "checkpoint_dir"):
        if getattr(hp, flag) is None:
            raise UsageError(f"--{flag}: expected a path")
    from lit_gpt import hardware
    from lit_gpt.conversion.gguf import importer

    importer.convert(hp.gguf_path, hp.checkpoint_dir, hardware.DTYPES[hp.dtype])
    print(f"converted {hp.gguf_path} to {hp.checkpoint_dir}; next:")
    print(f"  python scripts/prepare_alpaca.py --checkpoint_dir {hp.checkpoint_dir}")
    print(f'  python generate/base.py --checkpoint_dir {hp.checkpoint_dir} --prompt "..."')


if __name__ == "__main__":
    run(main)
