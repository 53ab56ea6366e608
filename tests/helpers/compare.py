"""Compare tensors and models."""

import torch

TOLERANCE = 1e-4  # of the logits' norm, float32


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of what was expected."""
    return ((found - expected).norm() / expected.norm()).item()


def tokens(model, rows=2, length=40) -> torch.Tensor:
    """Return the same random token ids, (rows, length), on every call for a vocabulary."""
    return torch.randint(model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def in_steps(idx: torch.Tensor) -> list[torch.Tensor]:
    """Cut `idx` as generation does: the prompt at once, then some tokens together, then one by one.

    The prompt is beyond all original contexts: LongRoPE rotates other tokens otherwise.
    """
    return [idx[:, :33], idx[:, 33:36], *idx[:, 36:].split(1, dim=1)]


def identical(a: dict, b: dict) -> bool:
    """Tell whether two state dicts have the same names and, bit by bit, the same tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
