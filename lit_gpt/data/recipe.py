"""Says with which flags LoRA learns from so many rows: what the prepare scripts print as the next command."""

import math

ARTICLE_ROWS = 12_800  # from here on the defaults, those of the Falcon articles, take 100 steps or more
FEWEST_STEPS = 75  # that scripts/quickstart.py takes, and learns from 285 rows with the flags below
LAYERS = "--lora_key true --lora_projection true --lora_mlp true"


def recipe(rows: int) -> str:
    """Return the flags of finetune/lora.py for a training split of so many rows: a small batch, all linear layers, a
    higher rate, and as many epochs as make enough steps.

    They are those of the quickstart, which writes 38 of 40 unseen bookings exactly after them
    (benchmarks/results/quickstart.md). From 12,800 rows on they are empty: the defaults do.
    """
    if rows >= ARTICLE_ROWS:
        return ""
    batch = next(size for size, fewer_than in ((4, 1000), (8, 4000), (16, ARTICLE_ROWS)) if rows < fewer_than)
    epochs = math.ceil(FEWEST_STEPS * batch / rows)
    flags = f"--batch_size {batch} --learning_rate 2e-3 {LAYERS} --eval_interval 20"
    return flags + (f" --epochs {epochs}" if epochs > 1 else "")
