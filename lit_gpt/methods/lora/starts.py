"""Starts of LoRA that are computed: from the base's weights PiSSA, OLoRA and DoRA's magnitudes, from the data EVA.

PiSSA and OLoRA as published move a part of each weight into B A. Here the base stays as it is: what B A is at first is
kept, as `start_A` and `start_B`, and subtracted. The function and its gradients are the same, a fresh model is the base
up to rounding, and the file goes with the base that everything else goes with.
"""

import torch
from torch import Tensor, nn

from lit_gpt.errors import UsageError
from lit_gpt.methods.hyperparameters import LoRAConfig
from lit_gpt.methods.lora.factors import Factors
from lit_gpt.methods.lora.layers import lora_layers
from lit_gpt.methods.method import Start
from lit_gpt.model.gpt import GPT
from lit_gpt.quantization.modules import weight_of

EVA_TOKENS = 2048  # of the row from which EVA starts


@torch.no_grad()
def initialize(model: GPT, config: LoRAConfig, start: Start | None) -> None:
    """Fill what starts from the base's weights or the data, in place. To be called once, when training begins.

    Loading, resuming and planning do without: the finetuned file holds what this gives.
    """
    if config.init == "eva" and start is not None:
        start_from_inputs(model, config, start)
    for layer in lora_layers(model).values():
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


def start_from_inputs(model: GPT, config: LoRAConfig, start: Start) -> None:
    """Fill A with the directions in which the layer's inputs vary most (Paischer et al. 2024, EVA, arXiv 2410.07170).

    They are the right singular vectors of the inputs that a row of the first samples gives. All layers have the same
    rank: the paper's redistribution of ranks is left out (its rho is 1).

    Raises:
        UsageError: the row has fewer tokens than there are ranks.
    """
    rows: list[int] = []
    tokens = 0
    while tokens < EVA_TOKENS and len(rows) < start.samples:
        rows.append(len(rows))
        tokens += start.row(rows[-1:]).tokens
    if tokens < config.r:
        raise UsageError(f"--lora_init eva: the data has {tokens} tokens; expected as many as --lora_r {config.r}")

    def fill(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, Factors)
        directions = torch.linalg.svd(inputs[0].flatten(0, -2).float(), full_matrices=False).Vh[: config.r]
        layer.lora_A.copy_(directions.repeat(len(layer.parts), 1))

    hooks = [layer.register_forward_pre_hook(fill) for layer in lora_layers(model).values()]
    training, row = model.training, start.row(rows)
    try:
        x = model.eval().hidden(row.idx, row.segments)
        if config.head:
            model.lm_head(model.ln_f(x[:, : max(config.r, 64)]))  # of all tokens the logits would be large
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()


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
