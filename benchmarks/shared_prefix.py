"""What it would save to compute a prefix that all samples share once in each packed row, counted without training.

    python benchmarks/shared_prefix.py --data_dir data/gsm8k
    python benchmarks/shared_prefix.py --prefix 28

Only without dropout are the hidden states of a shared prefix the same in each sample. Products go by tokens, attention
by pairs of a query and a key.
"""

from pathlib import Path

from lit_gpt.cli import NonNegativeInt, PositiveInt, run

data_dir: Path | None = None  # prepared data (null: lengths like Alpaca's)
prefix: NonNegativeInt = 28  # without data_dir: tokens of the prefix; Alpaca's template has about so many
batch_size: PositiveInt = 128  # samples per optimizer step
seed: NonNegativeInt = 1337  # of data order


def main() -> None:
    import torch
    from peers.synthetic import lengths_like_alpaca

    from lit_gpt.data import dataset as data

    if data_dir:
        dataset = data.Dataset(data_dir, "train")
        lengths, shared = [n - 1 for n in dataset.lengths], shared_by_all(dataset)
    else:
        lengths = lengths_like_alpaca(12800, 2048, torch.Generator().manual_seed(seed))
        shared, lengths = prefix, [max(n, prefix + 2) for n in lengths]
    print(f"{len(lengths):,} samples, {sum(lengths) / len(lengths):.0f} tokens in the mean, the first {shared} shared")
    for tokens in (1024, 2048, 4096, 16384):
        products, pairs = saved(lengths, shared, tokens)
        what = f"{products:5.1%} of the blocks' products saved, {pairs:5.1%} of attention's pairs"
        print(f"  rows of {tokens:>5} tokens: {what}")


def shared_by_all(dataset) -> int:
    """Tokens that all samples begin with."""
    first = dataset[0].tokens
    shared = len(first)
    for sample in dataset:
        n = min(shared, len(sample.tokens))
        other = (sample.tokens[:n] != first[:n]).nonzero()
        shared = int(other[0]) if len(other) else n
    return shared


def saved(lengths: list[int], shared: int, tokens: int) -> tuple[float, float]:
    """The shares of the blocks' products and of attention's pairs that are not computed."""
    from lit_gpt.data import packing

    spared, steps = 0, len(lengths) // batch_size
    used = [packing.step_samples(len(lengths), batch_size, seed, step, len(lengths)) for step in range(steps or 1)]
    for indices in used:
        spared += sum(len(row) - 1 for row in packing.micro_batches(indices, lengths, None, tokens))
    all_used = [lengths[i] for indices in used for i in indices]
    pairs = sum(n * (n + 1) // 2 for n in all_used)
    products = spared * shared / sum(all_used)
    return products, spared * shared * (shared + 1) // 2 / pairs


if __name__ == "__main__":
    run(main)
