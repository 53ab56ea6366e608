"""Write a converted checkpoint with its weights in fewer bits, to generate from or to finetune beside.

    python scripts/quantize.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --quantize nf4 \\
        --out_dir checkpoints/tiiuae/falcon-7b-nf4

Goes tensor by tensor: memory for the whole model is never needed. The result is what the flag --quantize of the other
scripts makes each time anew.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace

from lit_gpt.cli import Quantizer, run
from lit_gpt.errors import UsageError

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # converted folder
out_dir: Path | None = None  # where to write; must not hold anything yet
quantize: Quantizer = "nf4"  # int8: a scale per output channel; int4, nf4: per 64 weights; nf4-dq: these in 8 bits


def main(hp: SimpleNamespace) -> None:
    if hp.out_dir is None:
        raise UsageError("--out_dir: expected a folder to write to")
    from lit_gpt import checkpoint, hf_files
    from lit_gpt.base import Base
    from lit_gpt.prompts import FILE

    base = Base.of(hp.checkpoint_dir, hp.quantize)
    with checkpoint.new_folder(hp.out_dir) as folder:
        base.write_quantized(folder)
        (folder / "lit_config.json").write_text(base.config.to_json())
        hf_files.copy_side_files(hp.checkpoint_dir, folder)
        if (hp.checkpoint_dir / FILE).exists():  # of a finetune
            shutil.copyfile(hp.checkpoint_dir / FILE, folder / FILE)
        sizes = [(path / "lit_model.pth").stat().st_size / 1e9 for path in (hp.checkpoint_dir, folder)]
    print(f"wrote {hp.out_dir}: {sizes[1]:.2f} GB in place of {sizes[0]:.2f} GB")


if __name__ == "__main__":
    run(main)
