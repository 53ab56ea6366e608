"""GPTQ (Frantar et al. 2022): rounding column by column that makes up for its own errors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gpt.quantization.formats import GROUP, FourBit, Tensors

DAMPING = 0.01  # share of the mean of the inputs' squares, added lest least squares follow noise


@dataclass
class Statistics:
    """Holds sums over all tokens of outer products with a layer's inputs b from the quantized stream.

    All are float32. The layer is to reproduce from b what it gives for the exact inputs a.
    """

    inputs: Tensor  # sum of b b^T, (in_features, in_features)
    missing: Tensor  # sum of (a - b) b^T, (in_features, in_features)
    lost: Tensor  # sum of e b^T, (out_features, in_features): e is what the hidden states lost before the layer

    @classmethod
    def zeros(cls, out_features: int, in_features: int, device: torch.device) -> "Statistics":
        """Return sums over no tokens yet."""
        rows = in_features, in_features, out_features
        return cls(*(torch.zeros(n, in_features, device=device) for n in rows))

    def add(self, exact: Tensor, quantized: Tensor, lost: Tensor | None, factor: float) -> None:
        """Add tokens: the layer's inputs from the exact and the quantized stream, (B, T, in_features) in any dtype.

        Args:
            lost: (B, T, out_features), which times `factor` the layer's output is to restore as well; None: nothing.
        """
        a, b = exact.flatten(0, 1).float(), quantized.flatten(0, 1).float()
        self.inputs.addmm_(b.T, b)
        self.missing.addmm_((a - b).T, b)
        if lost is not None:
            self.lost.addmm_(lost.flatten(0, 1).float().T, b, alpha=factor)


def quantize(weight: Tensor, stats: Statistics, quantizer: FourBit, dtype: torch.dtype) -> Tensors:
    """Return the tensors of a layer's weight (out, in), float32, fitted to its statistics; these are used up.

    Args:
        dtype: what the tensors have whose dtype the format leaves open.
    """
    squares = stats.inputs.diagonal()
    squares += DAMPING * squares.mean() + torch.finfo(torch.float32).tiny
    triangle, failed = torch.linalg.cholesky_ex(stats.inputs)
    if failed:  # inputs that are not numbers; nor will be what comes of them
        triangle = torch.full_like(triangle, torch.nan)
    shift = torch.cholesky_solve(torch.addmm(stats.lost, weight, stats.missing).T, triangle).T
    codes, params = gptq(weight + shift, squares, torch.cholesky_inverse(triangle), quantizer)
    rows, columns = weight.shape
    return quantizer.stored(quantizer.tensors(codes, *params), rows, columns, dtype)


def gptq(weight: Tensor, squares: Tensor, inverse: Tensor, quantizer: FourBit) -> tuple[Tensor, list[Tensor]]:
    """Round a weight (out, in), group by group and in each column by column, the largest inputs first.

    Args:
        squares: (in,), the sum of squares of each input.
        inverse: (in, in), the inverse of the sum of the inputs' outer products.

    Returns:
        The codes (out, groups * GROUP), and each of the groups' parameters (out, groups).
    """
    groups = torch.arange(len(squares), device=weight.device).split(GROUP)
    order = sorted(range(len(groups)), key=lambda g: -squares[groups[g]].sum().item())
    columns = [groups[g][squares[groups[g]].argsort(descending=True)] for g in order]
    inverse = inverse[torch.cat(columns)][:, torch.cat(columns)]
    upper = torch.linalg.cholesky_ex(inverse, upper=True).L
    remaining = weight.T[torch.cat(columns)].contiguous()  # (in, out): what is not rounded yet
    codes = torch.zeros(len(groups) * GROUP, len(weight), dtype=torch.uint8, device=weight.device)
    group_params = [torch.empty(len(weight), len(groups), device=weight.device) for _ in quantizer.PARAMS]
    start = 0
    for g, places in zip(order, columns, strict=True):
        span = slice(start, start := start + len(places))
        triangle, block, errors = upper[span, span], remaining[span], torch.empty_like(remaining[span])
        params = quantizer.fit_params(block.T.contiguous(), triangle.diagonal() ** -2)
        for of_all_groups, of_this in zip(group_params, params, strict=True):
            of_all_groups[:, g : g + 1] = of_this
        params = tuple(x.squeeze(1) for x in params)
        for i, place in enumerate(places.tolist()):
            picked = quantizer.codes(block[i], *params)
            codes[place] = picked
            errors[i] = (block[i] - quantizer.values(picked, *params)) / triangle[i, i]
            block[i + 1 :].addr_(triangle[i, i + 1 :], errors[i], alpha=-1)
        remaining[start:].addmm_(upper[span, start:].T, errors, alpha=-1)
    return codes.T, group_params
