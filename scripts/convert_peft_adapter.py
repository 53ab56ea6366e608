"""Take in a LoRA adapter that PEFT trained, to generate with it, finetune it further or fold it into its base.

    python scripts/convert_peft_adapter.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --peft_dir downloads/adapter \\
        --out_dir out/lora/adapter

Writes lit_model_lora_finetuned.pth. What the adapter has and LoRA here has not is refused by name; where PEFT is
installed the logits are compared with its own before anything is put in place.
"""

from pathlib import Path
from types import SimpleNamespace

from lit_gpt.cli import run
from lit_gpt.errors import UsageError

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # converted folder of the base
peft_dir: Path | None = None  # the adapter: adapter_config.json and adapter_model.safetensors
out_dir: Path | None = None  # where to write; must not hold anything yet


def main(hp: SimpleNamespace) -> None:
    for flag in ("peft_dir", "out_dir"):
        if getattr(hp, flag) is None:
            raise UsageError(f"--{flag}: expected a folder")
    from lit_gpt.conversion import export

    settings = export.from_peft(hp.peft_dir, hp.checkpoint_dir, hp.out_dir)
    flags = " ".join(f"--lora_{name} {str(value).lower()}" for name, value in vars(settings).items())
    path = hp.out_dir / "lit_model_lora_finetuned.pth"
    print(f"wrote {path}; next:")
    print(f'  python generate/lora.py --checkpoint_dir {hp.checkpoint_dir} --lora_path {path} --prompt "..."')
    print(f"  python finetune/lora.py --checkpoint_dir {hp.checkpoint_dir} --lora_path {path} {flags} ...")


if __name__ == "__main__":
    run(main)
