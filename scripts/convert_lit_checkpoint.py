"""Export a checkpoint for use elsewhere: a folder that transformers loads, a PEFT adapter, or a GGUF file.

    python scripts/convert_lit_checkpoint.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --out_dir out/falcon-7b-hf
    python scripts/convert_lit_checkpoint.py --checkpoint_dir checkpoints/tiiuae/falcon-7b \\
        --lora_path out/lora/alpaca/lit_model_lora_finetuned.pth --out_dir out/falcon-7b-alpaca-peft
    python scripts/convert_lit_checkpoint.py --checkpoint_dir out/falcon-7b-alpaca --format gguf --dtype q8_0 \\
        --out_dir out/falcon-7b-alpaca-gguf

What was written is read back, by transformers, PEFT and gguf where they are installed, and compared with the source on
golden prompts: logits, tokens, chat template. What differs is refused. A model card goes along, and export.json with
the figures and hashes.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from lit_gpt.cli import run
from lit_gpt.errors import UsageError

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # converted folder (or what merge_lora.py wrote)
lora_path: Path | None = None  # export this LoRA file as a PEFT adapter of checkpoint_dir, its base
out_dir: Path | None = None  # where to write; must not hold anything yet
format: Literal["hf", "gguf"] = "hf"  # of a checkpoint: a folder for transformers, or a file for llama.cpp
dtype: Literal["f32", "f16", "bf16", "q8_0"] | None = None  # of a GGUF's matrices (null: as the checkpoint's)


def main(hp: SimpleNamespace) -> None:
    if hp.out_dir is None:
        raise UsageError("--out_dir: expected a folder to write to")
    if hp.lora_path and hp.format == "gguf":
        raise UsageError("--lora_path: of --format gguf the whole model; fold LoRA in with scripts/merge_lora.py first")
    if hp.dtype and hp.format != "gguf":
        raise UsageError(f"--dtype {hp.dtype}: is for --format gguf; other weights are exported as they are")
    from lit_gpt.conversion import export

    if hp.lora_path:
        found, loads = (
            export.to_peft(hp.checkpoint_dir, hp.lora_path, hp.out_dir),
            "PeftModel.from_pretrained(base, '{}')",
        )
    elif hp.format == "gguf":
        found, loads = export.to_gguf(hp.checkpoint_dir, hp.out_dir, hp.dtype), "llama.cpp loads the .gguf file in {}"
    else:
        found, loads = export.to_hf(hp.checkpoint_dir, hp.out_dir), "AutoModelForCausalLM.from_pretrained('{}')"
    off, reader = found["logits_difference"], found["reader"]
    print(f"wrote {hp.out_dir}; read back by {reader}, its logits differ from the source's by {off:.1e} of their norm")
    print(f"  {loads.format(hp.out_dir)}")


if __name__ == "__main__":
    run(main)
