"""Export a converted or finetuned checkpoint folder to one that transformers loads.

    python scripts/convert_lit_checkpoint.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --out_dir out/falcon-7b-hf

Writes safetensors shards, config.json, the tokenizer's files and generation_config.json.
"""

from pathlib import Path
from types import SimpleNamespace

from lit_gpt.cli import run
from lit_gpt.errors import UsageError

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # converted folder (or what merge_lora.py wrote)
out_dir: Path | None = None  # where to write; must not hold anything yet


def main(hp: SimpleNamespace) -> None:
    if hp.out_dir is None:
        raise UsageError("--out_dir: expected a folder to write to")
    from lit_gpt import checkpoint, hf_files

    lit = checkpoint.load_state(hp.checkpoint_dir)
    with checkpoint.new_folder(hp.out_dir) as folder:
        hf_files.export(hp.checkpoint_dir, folder, lit)
    print(f"wrote {hp.out_dir}: transformers.AutoModelForCausalLM.from_pretrained('{hp.out_dir}') loads it")


if __name__ == "__main__":
    run(main)
