"""Export a checkpoint for use elsewhere: a folder that transformers loads, a PEFT adapter, or a GGUF file.

    python scripts/convert_lit_checkpoint.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --out_dir out/falcon-7b-hf
    python scripts/convert_lit_checkpoint.py --checkpoint_dir checkpoints/tiiuae/falcon-7b \\
        --finetuned_path out/lora/alpaca/lit_model_lora_finetuned.pth --out_dir out/falcon-7b-alpaca-peft
    python scripts/convert_lit_checkpoint.py --checkpoint_dir out/falcon-7b-alpaca --format gguf --dtype q8_0 \\
        --out_dir out/falcon-7b-alpaca-gguf

What was written is read back, by transformers, PEFT and gguf where they are installed, and compared with the source on
reference prompts: logits, tokens, chat template. What differs is refused. A model card goes along, and export.json with
the figures and hashes.
"""

from pathlib import Path
from typing import Literal

from lit_gpt.checkpoints.folder import check_inputs
from lit_gpt.cli import run
from lit_gpt.errors import UsageError
from lit_gpt.files import check_new

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # Export this (or what merge_lora.py wrote).
finetuned_path: Path | None = None  # Export this LoRA, IA3 or prompt file as a PEFT adapter of its base.
out_dir: Path | None = None  # Write to this folder, which must not hold anything yet.
format: Literal["hf", "gguf"] = "hf"  # Write a folder for transformers, or a file for llama.cpp.
dtype: Literal["bf16", "fp16", "fp32", "q8_0"] | None = None  # Store weights so (null: as the checkpoint's).


def main() -> None:
    if out_dir is None:
        raise UsageError("--out_dir: expected a folder to write to")
    if finetuned_path and format == "gguf":
        raise UsageError(
            "--finetuned_path: of --format gguf the whole model; fold LoRA in with scripts/merge_lora.py first"
        )
    if dtype and finetuned_path:
        raise UsageError(f"--dtype {dtype}: an adapter is exported as it is; leave it out")
    if dtype == "q8_0" and format == "hf":
        raise UsageError("--dtype q8_0: is for --format gguf; expected bf16, fp16 or fp32")
    check_inputs(checkpoint_dir, finetuned_path)
    check_new(out_dir)
    from lit_gpt import hardware
    from lit_gpt.conversion import export

    if finetuned_path:
        figures = export.to_peft(checkpoint_dir, finetuned_path, out_dir)
        loads = "PeftModel.from_pretrained(base, '{}')"
    elif format == "gguf":
        figures, loads = export.to_gguf(checkpoint_dir, out_dir, dtype), "llama.cpp loads the .gguf file in {}"
    else:
        figures, loads = (
            export.to_hf(checkpoint_dir, out_dir, hardware.DTYPES.get(dtype)),
            "AutoModelForCausalLM.from_pretrained('{}')",
        )
    off, reader = figures["logits_difference"], figures["reader"]
    print(f"wrote {out_dir}; read back by {reader}, its logits differ from the source's by {off:.1e} of their norm")
    print(f"  {loads.format(out_dir)}")


if __name__ == "__main__":
    run(main, aliases={"lora_path": "finetuned_path"})  # spelling of before
