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


@dataclass
class RowSampling:
    """How tokens are drawn for several rows at once, on the device.

    Attributes:
        temperature, top_p, min_p: float32 (rows,); top_k: int64 (rows,); see Sampling.
        seeds: int64 (rows,), of each row's random numbers.
        chosen: what the tensors say.
    """

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    top_k: Tensor
    seeds: Tensor
    chosen: list[Sampling]

    @classmethod
    def zeros(cls, rows: int, device: torch.device) -> "RowSampling":
        """Return tensors for so many rows, to be filled by `choose`."""
        temperature, top_p, min_p = (torch.zeros(rows, device=device) for _ in range(3))
        top_k, seeds = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
        return cls(temperature, top_p, min_p, top_k, seeds, [])

    def choose(self, samplings: list[Sampling]) -> str:
        """Let rows be drawn so from now on; return what they need: "greedy", "sampled", or "restricted" ones as well.

        Penalties for repetition, which look at the sequence, are not among it.
        """
        if samplings != self.chosen:
            self.chosen, n = samplings, len(samplings)
            columns = zip(*((s.temperature, s.top_p, s.min_p) for s in samplings), strict=True)
            for target, column in zip((self.temperature, self.top_p, self.min_p), columns, strict=True):
                target[:n].copy_(torch.tensor(column), non_blocking=True)
            self.top_k[:n].copy_(torch.tensor([s.top_k or 0 for s in samplings]), non_blocking=True)
        if all(s.temperature == 0 for s in samplings):
            return "greedy"
        restricted = any(s.top_k is not None or s.top_p < 1 or s.min_p > 0 for s in samplings)
        return "restricted" if restricted else "sampled"


def sample_rows(logits: Tensor, sampling: RowSampling, noise: Tensor, kind: str) -> Tensor:
    """Draw a token id of each row, int64 (rows,), from logits (rows, vocabulary), as `sample` does, without a wait.

    Args:
        noise: (rows, vocabulary), of the exponential distribution: of probabilities over such numbers the largest falls
            on each token as often as the probabilities say (Gumbel 1954).
        kind: what `RowSampling.choose` has returned.
    """
    likeliest = logits.argmax(-1)
    if kind == "greedy":
        return likeliest
    temperature, top_p, min_p, top_k = (
        x[: len(logits)].unsqueeze(1) for x in (sampling.temperature, sampling.top_p, sampling.min_p, sampling.top_k)
    )
    logits = logits.float() / torch.where(temperature == 0, 1.0, temperature)
    if kind == "restricted":
        ordered, order = logits.sort(descending=True)
        last = torch.where(top_k == 0, logits.size(1), top_k).clamp(max=logits.size(1)) - 1
        ordered = ordered.masked_fill(ordered < ordered.gather(1, last), -torch.inf)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities > top_p
        ordered = ordered.masked_fill(beyond & (top_p < 1), -torch.inf)
        probabilities = ordered.softmax(-1)
        ordered = ordered.masked_fill(probabilities < min_p * probabilities[:, :1], -torch.inf)
        logits = torch.empty_like(logits).scatter_(1, order, ordered)
    drawn = (logits - noise.log()).argmax(-1)
    return torch.where(temperature.squeeze(1) == 0, likeliest, drawn)
