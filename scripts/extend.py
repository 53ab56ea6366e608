"""Extend a converted checkpoint before it is finetuned: a longer context, new tokens, or both.

    python scripts/extend.py --checkpoint_dir checkpoints/tiiuae/falcon-7b --out_dir checkpoints/falcon-7b-8k \\
        --context_factor 4 --add_tokens "<call>" "</call>"

Positions are divided by the factor. New special tokens go into the tokenizer, and their embeddings begin as the mean of
all others. Data is prepared with the new folder, and finetuning starts from it: --train_embeddings both trains what is
new, and what is merged or exported has all of it.
"""

from pathlib import Path

from lit_gpt.checkpoints.folder import check_inputs
from lit_gpt.cli import PositiveFloat, run
from lit_gpt.errors import UsageError
from lit_gpt.files import check_new

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # Extend this converted folder.
out_dir: Path | None = None  # Write to this folder, which must not hold anything yet.
context_factor: PositiveFloat = 1.0  # Make the context this many times as long.
add_tokens: list[str] = []  # Add these special tokens to the vocabulary.


def main() -> None:
    if out_dir is None:
        raise UsageError("--out_dir: expected a folder to write to")
    if context_factor < 1 or (context_factor == 1 and not add_tokens):
        raise UsageError(f"--context_factor {context_factor:g}: expected more than 1, or --add_tokens")
    check_inputs(checkpoint_dir)
    check_new(out_dir)
    from lit_gpt.conversion.extension import extend

    config = extend(checkpoint_dir, out_dir, context_factor, add_tokens)
    print(f"wrote {out_dir}: a context of {config.block_size}, and {config.padded_vocab_size} tokens")


if __name__ == "__main__":
    run(main)
