"""Take training steps on random tokens."""

import torch
from torch import Tensor

from lit_gpt import GPT
from lit_gpt.data import dataset, packing
from lit_gpt.model.packed_inputs import Targets


def train(model: GPT, steps: int = 2) -> None:
    """Take AdamW steps on random tokens, with an evaluation before and between, as the loop does."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        idx = torch.randint(96, (1, 20), generator=torch.Generator().manual_seed(step))
        targets = Targets(torch.arange(19), idx[0, 1:])
        with torch.no_grad():
            model.eval()(idx, targets=targets)
            model(idx[:, :5], cache=model.kv_cache(1, 5))
        model.train()(idx, targets=targets).backward()
        optimizer.step()
        optimizer.zero_grad()


def random_samples(lengths: tuple[int, ...] = (9, 31, 5)) -> list[dataset.Sample]:
    """Return samples of these lengths, all tokens supervised."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(96, (n,), generator=generator, dtype=torch.int32) for n in lengths]
    return [dataset.Sample(t, torch.ones(len(t), dtype=torch.uint8), i) for i, t in enumerate(tokens)]


def random_row(lengths: tuple[int, ...] = (9, 31, 5)) -> packing.PackedRow:
    """Return such samples packed into one row."""
    return packing.pack(random_samples(lengths))


def step(gpt: GPT, row: packing.PackedRow, seed: int = 0) -> list[Tensor]:
    """Return the gradients of all trainable parameters on one row."""
    torch.manual_seed(seed)
    gpt.train().zero_grad()
    gpt(row.idx, segments=row.segments, targets=row.targets).backward()
    return [p.grad.clone() for p in gpt.parameters() if p.requires_grad]
