"""Starts of LoRA that are computed from the base's weights: PiSSA, OLoRA, and DoRA's magnitudes.

PiSSA and OLoRA as published move a part of each weight into B A. Here the base stays as it is: what B A is at first is
kept, as `start_A` and `start_B`, and subtracted. The function and its gradients are the same, a fresh model is the base
up to rounding, and the file goes with the base that everything else goes with.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from lit_gpt.methods.hyperparameters import LoRAConfig
from lit_gpt.methods.lora.factors import Factors
from lit_gpt.quantization.modules import weight_of


@torch.no_grad()
def initialize(layers: Iterable[Factors], config: LoRAConfig) -> None:
    """Fill what starts from the base's weights, in place. To be called once, when training begins.

    Loading, resuming and planning do without: the finetuned file holds what this gives.
    """
    for layer in layers:
        if config.changes_start:
            start_from_weights(layer, config)
        if layer.magnitude is not None:
            layer.magnitude.copy_(layer.lengths(*layer.factors()))


def start_from_weights(layer: Factors, config: LoRAConfig) -> None:
    """Fill A and B of each projection from a decomposition of its weight, and keep them as what is subtracted."""
    weight, decompose = weight_of(layer.linear), {"pissa": pissa, "olora": olora}[config.init]
    As, Bs = zip(
        *(decompose(weight[..., start:stop, :].float(), config.r, config.scale) for start, stop in layer.parts),
        strict=True,
    )
    for name, parts in {"A": As, "B": Bs}.items():
        for parameter in (layer.get_parameter(f"lora_{name}"), layer.get_parameter(f"start_{name}")):
            parameter.copy_(torch.cat(parts, dim=-2))


def pissa(weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return A and B, whose scaled product is the best approximation of rank r (Meng et al. 2024, arXiv 2404.02948).

    W = U S V^T, A = sqrt(S_r / scale) V_r^T, B = U_r sqrt(S_r / scale).

    Args:
        weight: float32 (..., rows, in_features).

    Returns:
        A (..., r, in_features) and B (..., rows, r).
    """
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    root = (S[..., :r] / scale).sqrt()
    return root.unsqueeze(-1) * Vh[..., :r, :], U[..., :r] * root.unsqueeze(-2)


def olora(weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return A and B of the first r columns and rows of W = Q R (Buyukakyuz 2024, arXiv 2406.01775); see `pissa`."""
    Q, R = torch.linalg.qr(weight)
    return R[..., :r, :], Q[..., :r]
