"""Take in what LitGPT has downloaded, converted or finetuned: a checkpoint folder, or the LoRA weights alone.

    python scripts/convert_litgpt_checkpoint.py --litgpt_dir litgpt/checkpoints/tiiuae/falcon-7b \\
        --out_dir checkpoints/tiiuae/falcon-7b
    python scripts/convert_litgpt_checkpoint.py --litgpt_dir litgpt/out/finetune/lora/final --lora true \\
        --checkpoint_dir checkpoints/tiiuae/falcon-7b --out_dir out/lora/litgpt

The first reads lit_model.pth, config.json and model_config.yaml; the second lit_model.pth.lora and
hyperparameters.yaml, and writes lit_model_lora_finetuned.pth. Tensors that are missing or left over are an error.
"""

import shlex
from pathlib import Path

from lit_gpt.checkpoints.folder import check_inputs
from lit_gpt.cli import run
from lit_gpt.errors import UsageError, UserError
from lit_gpt.files import check_new

litgpt_dir: Path | None = None  # Read this folder.
out_dir: Path | None = None  # Write to this folder, which must not hold anything yet.
lora: bool = False  # Read the LoRA weights in it, not the whole model.
checkpoint_dir: Path | None = None  # With --lora true: the base that they were trained on, converted.


def main() -> None:
    if litgpt_dir is None or out_dir is None:
        raise UsageError(f"--{'out_dir' if litgpt_dir else 'litgpt_dir'}: expected a folder")
    if lora != (checkpoint_dir is not None):
        raise UsageError("--lora true goes with --checkpoint_dir, the converted base; a whole model with neither")
    name = "lit_model.pth" + ".lora" * lora
    if not (litgpt_dir / name).is_file():
        there = ", ".join(sorted(path.name for path in litgpt_dir.glob("*"))[:8]) or "nothing"
        raise UserError(f"--litgpt_dir {litgpt_dir}: has no {name}; found {there}")
    if checkpoint_dir:
        check_inputs(checkpoint_dir)
    check_new(out_dir)
    from lit_gpt.conversion import litgpt

    base, out = shlex.quote(str(checkpoint_dir or out_dir)), shlex.quote(str(out_dir))
    if checkpoint_dir:
        litgpt.convert_lora(litgpt_dir, checkpoint_dir, out_dir)
        file = f"{out}/lit_model_lora_finetuned.pth"
        print(f"wrote {file}; next:")
        print(f'  python generate/lora.py --checkpoint_dir {base} --finetuned_path {file} --prompt "..."')
        return
    litgpt.convert(litgpt_dir, out_dir)
    print(f"converted {litgpt_dir} to {out_dir}; next:")
    print(f'  python generate/base.py --checkpoint_dir {base} --prompt "..."')


if __name__ == "__main__":
    run(main)
