"""Says with which flags LoRA learns from so many rows: what the prepare scripts print as the next command."""

import math

ARTICLE_ROWS = 12_800  # from here on the defaults, those of the Falcon articles, take 100 steps or more
FEWEST_STEPS = 75  # that scripts/quickstart.py takes, and learns from 285 rows with the flags below
TOO_FEW_STEPS = 30  # optimizer steps from which no task that was tried here was learned
LAYERS = "--lora_key true --lora_projection true --lora_mlp true"


def recipe(rows: int) -> str:
    """Return the flags of finetune/lora.py for a training split of so many rows: a small batch, all linear layers, a
    higher rate, and as many epochs as make enough steps.

    They are those of the quickstart, which writes 38 of 40 unseen bookings exactly after them
    (benchmarks/results/quickstart.md), and does as well at three other tasks (benchmarks/results/recipe.md). From
    12,800 rows on they are empty: the defaults do.
    """
    if rows >= ARTICLE_ROWS:
        return ""
    batch, epochs = batch_and_epochs(rows)
    flags = f"--batch_size {batch} --learning_rate 2e-3 {LAYERS} --eval_interval 20"
    return flags + (f" --epochs {epochs}" if epochs > 1 else "")


def batch_and_epochs(rows: int) -> tuple[int, int]:
    """Return a batch size for fewer than ARTICLE_ROWS rows, and the epochs that make enough steps of it."""
    batch = next(size for size, fewer_than in ((4, 1000), (8, 4000), (16, ARTICLE_ROWS)) if rows < fewer_than)
    return batch, math.ceil(FEWEST_STEPS * batch / rows)


def too_short(rows: int, steps: int) -> str:
    """Return a warning for a run over so many rows that takes too few steps to learn from them; "" for a longer one."""
    if steps >= TOO_FEW_STEPS or rows >= ARTICLE_ROWS:
        return ""
    batch, epochs = batch_and_epochs(rows)
    return (
        f"the run takes {steps} optimizer steps, which are too few to learn a task; from {rows} rows "
        f"--batch_size {batch} --epochs {epochs} makes {math.ceil(rows * epochs / batch)}"
    )
