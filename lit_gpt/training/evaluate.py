"""Validation: the loss over all ranks, and a sample answer."""

from types import SimpleNamespace

import torch
from lightning.fabric import Fabric
from torch import nn
from tqdm import tqdm

from lit_gpt.data import dataset as data
from lit_gpt.data import packing
from lit_gpt.evaluation.perplexity import score_rows
from lit_gpt.generation.engine import generate
from lit_gpt.generation.steps import FastStep
from lit_gpt.model.gpt import GPT
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.training.probe import Probe


def rank_rows(
    dataset: data.Dataset | Probe, indices: list[int], hp: SimpleNamespace, fabric: Fabric
) -> list[list[data.Sample]]:
    """The samples of each of this rank's packed rows.

    Every rank gets as many rows, for they compute together; where one has none left, a row that teaches nothing.
    """
    size = hp.micro_batch_size, hp.micro_batch_tokens
    shares = [
        list(packing.micro_batches(indices[rank :: fabric.world_size], dataset.lengths, *size))
        for rank in range(fabric.world_size)
    ]
    rows = [[dataset[i] for i in part] for part in shares[fabric.global_rank]]
    idle = data.Sample(dataset[0].tokens[:2], torch.zeros_like(dataset[0].supervised[:2]))
    return rows + [[idle]] * (max(map(len, shares)) - len(rows))


def validate(
    fabric: Fabric, model: nn.Module, dataset: data.Dataset | Probe, hp: SimpleNamespace, count: int | None = None
) -> float:
    """Mean cross-entropy in nats over all supervised tokens of the first `count` samples, over all ranks."""
    model.eval()
    indices = list(range(len(dataset)))[:count]
    score = score_rows(model, rank_rows(dataset, indices, hp, fabric), fabric.device)
    total = torch.tensor([score.nats, score.tokens], device=fabric.device, dtype=torch.float64)
    nats, tokens = fabric.all_reduce(total, reduce_op="sum")
    return (nats / tokens).item()


def print_sample(
    fabric: Fabric, model: GPT, tokenizer: Tokenizer, style: PromptStyle, sample: data.Sample, hp: SimpleNamespace
) -> None:
    """Show how the model answers a validation prompt now. All ranks take part, for each may hold a share of it."""
    if not hp.sample_tokens:
        return
    start = int(sample.supervised.nonzero()[0]) or len(sample.tokens) // 2  # without a masked prompt: half of it
    prompt = sample.tokens[:start].tolist()
    room = min(hp.sample_tokens, model.config.block_size - len(prompt))
    model.eval()
    step = FastStep(model) if fabric.world_size == 1 else None
    ids = list(generate(model, prompt, room, temperature=0, stop_ids=style.stop_ids, step=step))
    if fabric.global_rank == 0:
        tqdm.write(f"  {tokenizer.decode(prompt)[-60:]!r} -> {tokenizer.decode(ids)!r}")
