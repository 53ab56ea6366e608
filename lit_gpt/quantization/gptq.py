"""GPTQ (Frantar et al. 2022): rounding column by column that makes up for its own errors."""

import torch
from torch import Tensor

from lit_gpt.quantization.formats import GROUP, FourBit


def gptq(weight: Tensor, squares: Tensor, inverse: Tensor, quantizer: FourBit) -> tuple[Tensor, list[Tensor]]:
    """Round a weight (out, in), group by group from the inputs of the largest squares on, as within each group.

    Args:
        squares: of the inputs, (in,).
        inverse: of the sum of their outer products, (in, in).

    Returns:
        the codes (out, groups * GROUP) and the groups' numbers, (out, groups) each.
    """
    groups = torch.arange(len(squares), device=weight.device).split(GROUP)
    order = sorted(range(len(groups)), key=lambda g: -squares[groups[g]].sum().item())
    columns = [groups[g][squares[groups[g]].argsort(descending=True)] for g in order]
    inverse = inverse[torch.cat(columns)][:, torch.cat(columns)]
    upper = torch.linalg.cholesky_ex(inverse, upper=True).L
    rest = weight.T[torch.cat(columns)].contiguous()  # (in, out): what is not rounded yet
    codes = torch.zeros(len(groups) * GROUP, len(weight), dtype=torch.uint8, device=weight.device)
    fitted = [torch.empty(len(weight), len(groups), device=weight.device) for _ in quantizer.FITTED]
    start = 0
    for g, places in zip(order, columns, strict=True):
        span = slice(start, start := start + len(places))
        triangle, block, errors = upper[span, span], rest[span], torch.empty_like(rest[span])
        found = quantizer.fit(block.T.contiguous(), triangle.diagonal() ** -2)
        for numbers, part in zip(fitted, found, strict=True):
            numbers[:, g : g + 1] = part
        found = [part.squeeze(1) for part in found]
        for i, place in enumerate(places.tolist()):
            picked = quantizer.codes(block[i], *found)
            codes[place] = picked
            errors[i] = (block[i] - quantizer.values(picked, *found)) / triangle[i, i]
            block[i + 1 :].addr_(triangle[i, i + 1 :], errors[i], alpha=-1)
        rest[start:].addmm_(upper[span, start:].T, errors, alpha=-1)
    return codes.T, fitted
