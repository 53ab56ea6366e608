"""Draws the next token from logits: the one path that all scripts and the server sample by."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among this many likeliest tokens only; None: all.
        top_p: sample among the likeliest tokens that together have this probability (Holtzman et al. 2020).
        min_p: leave out tokens of less than this part of the likeliest token's probability (Nguyen et al. 2024).
        repetition_penalty: divides the logits above 0, and multiplies those below, of all tokens that the sequence has
            already, the prompt's included (Keskar et al. 2019); 1 changes nothing.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, source: Any) -> "Sampling":
        """Return what the attributes of these names say, as SamplingArgs has them."""
        return cls(**{field.name: getattr(source, field.name) for field in fields(cls)})


GREEDY = Sampling(temperature=0.0)


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None, ids: Sequence[int] = ()) -> Tensor:
    """Draw one token id, int64 (1,), from logits (vocabulary,).

    Args:
        generator: on the logits' device; None: torch's own.
        ids: the sequence so far.
    """
    if sampling.repetition_penalty != 1:
        logits = penalize(logits, sampling.repetition_penalty, ids)
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(min(sampling.top_k, logits.numel())).values[-1], -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities > sampling.top_p  # the likeliest token is never among these
        logits = logits.index_fill(0, order[beyond], -torch.inf)
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < sampling.min_p * probabilities.max(), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


def penalize(logits: Tensor, penalty: float, ids: Sequence[int]) -> Tensor:
    """Return the logits with those of the tokens in `ids` made less likely; ids beyond them are of virtual tokens."""
    seen = torch.tensor(
        sorted({token for token in ids if token < logits.numel()}), dtype=torch.long, device=logits.device
    )
    chosen = logits.float()[seen]
    return logits.float().index_copy(0, seen, torch.where(chosen > 0, chosen / penalty, chosen * penalty))
