"""Convert a downloaded Hugging Face checkpoint to Lit-GPT's format, within its folder.

    python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/tiiuae/falcon-7b

Reads .safetensors or .bin shards one tensor at a time and adds lit_model.pth and lit_config.json.
"""

import shlex
from pathlib import Path
from typing import Literal

from lit_gpt.checkpoints.folder import check_checkpoint_dir
from lit_gpt.cli import run

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # Convert what scripts/download.py put here.
dtype: Literal["bf16", "fp16", "fp32"] | None = None  # Convert the weights to this (null: as stored).


def main() -> None:
    check_checkpoint_dir(checkpoint_dir, converted=False)
    from lit_gpt import hardware
    from lit_gpt.conversion import hf, hf_shards

    hf.convert(checkpoint_dir, hf_shards.StoredWeights(checkpoint_dir), hardware.DTYPES.get(dtype))
    print(f"converted {checkpoint_dir}; next:")
    folder_name = shlex.quote(str(checkpoint_dir))
    print(f"  python scripts/prepare_alpaca.py --checkpoint_dir {folder_name}")
    print(f'  python generate/base.py --checkpoint_dir {folder_name} --prompt "..."')


if __name__ == "__main__":
    run(main)
