"""Take in a LoRA adapter that PEFT trained, to generate with it, finetune it further or fold it into its base.

    python scripts/convert_peft_adapter.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --peft_dir downloads/adapter \\
        --out_dir out/lora/adapter

Writes lit_model_lora_finetuned.pth. What the adapter has and LoRA here has not is refused by name; where PEFT is
installed the logits are compared with its own before anything is put in place.
"""

import json
import shlex
from pathlib import Path

from lit_gpt.checkpoints.folder import check_inputs
from lit_gpt.cli import flag_values, run
from lit_gpt.errors import UsageError
from lit_gpt.files import check_new

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # Read the base from this converted folder.
peft_dir: Path | None = None  # Read adapter_config.json and adapter_model.safetensors from here.
out_dir: Path | None = None  # Write to this folder, which must not hold anything yet.


def main() -> None:
    if peft_dir is None:
        raise UsageError("--peft_dir: expected a folder")
    if out_dir is None:
        raise UsageError("--out_dir: expected a folder")
    check_inputs(checkpoint_dir)
    check_new(out_dir)
    from lit_gpt.conversion import export

    settings = export.from_peft(peft_dir, checkpoint_dir, out_dir)
    values = {
        name: value if isinstance(value, str) else json.dumps(value) for name, value in flag_values(settings).items()
    }
    flags = " ".join(f"--{name} {shlex.quote(value)}" for name, value in values.items() if value != "{}")
    path = out_dir / "lit_model_lora_finetuned.pth"
    base, file = shlex.quote(str(checkpoint_dir)), shlex.quote(str(path))
    print(f"wrote {path}; next:")
    print(f'  python generate/lora.py --checkpoint_dir {base} --finetuned_path {file} --prompt "..."')
    print(f"  python finetune/lora.py --checkpoint_dir {base} --finetuned_path {file} {flags} ...")


if __name__ == "__main__":
    run(main)
