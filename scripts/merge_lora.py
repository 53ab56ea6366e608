"""Fold LoRA weights into their base: a complete checkpoint folder, to generate from, finetune or export.

    python scripts/merge_lora.py --checkpoint_dir checkpoints/tiiuae/falcon-7b \\
        --lora_path out/lora/alpaca/lit_model_lora_finetuned.pth --out_dir out/falcon-7b-alpaca

Merges in fp32, one tensor at a time, and compares the logits with the unmerged model's before anything is written.
What was trained on a quantized base is merged into the dequantized one, and the result is not quantized.
"""

from pathlib import Path
from types import SimpleNamespace

from lit_gpt.cli import run
from lit_gpt.errors import UsageError

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # converted folder of the base, or a quantized one
lora_path: Path = Path("out/lora/alpaca/lit_model_lora_finetuned.pth")  # what finetune/lora.py wrote
out_dir: Path | None = None  # where to write; must not hold anything yet


def main(hp: SimpleNamespace) -> None:
    if hp.out_dir is None:
        raise UsageError("--out_dir: expected a folder to write to")
    from lit_gpt import checkpoint, hf_files, lora, variants, verify
    from lit_gpt.model import GPT
    from lit_gpt.prompts import PromptStyle

    with checkpoint.new_folder(hp.out_dir) as folder:
        model, record = variants.load_model(hp.checkpoint_dir, hp.lora_path, lora.METHOD)
        idx = verify.probe(model)
        expected = verify.float32_logits(model, idx)

        lora.write_merged(folder / "lit_model.pth", model)
        (folder / "lit_config.json").write_text(lora.merged_config(model).to_json())
        hf_files.copy_side_files(hp.checkpoint_dir, folder)
        PromptStyle.from_dict(record["prompt_style"]).save(folder)

        found = verify.float32_logits(GPT.from_checkpoint(folder), idx)
        off = verify.require_equal(found, expected, model.dtype, f"the merge of {hp.lora_path}")
    print(f"wrote {hp.out_dir}; its logits differ from the unmerged model's by {off:.1e} of their norm")


if __name__ == "__main__":
    run(main)
