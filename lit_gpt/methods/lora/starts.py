"""Starts of LoRA that are computed: from the base's weights PiSSA, OLoRA and DoRA's magnitudes, from the data EVA.

PiSSA and OLoRA as published move a part of each weight into B A. Here the base stays as it is: what B A is at first is
kept, as `start_A` and `start_B`, and subtracted. The function and its gradients are the same, a fresh model is the base
up to rounding, and the file goes with the base that everything else goes with.
"""

from collections.abc import Callable
from functools import partial

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
            start_from_weights(layer)
        if layer.magnitude is not None:
            layer.magnitude.copy_(layer.lengths(*layer.factors()))


def start_from_weights(layer: Factors) -> None:
    """Fill A and B of each projection from a decomposition of its weight, and keep them as what is subtracted."""
    weight, decompose = weight_of(layer.linear), {"pissa": pissa, "olora": olora}[layer.config.init]
    As, Bs = zip(
        *(decompose(weight[..., start:stop, :].float(), layer.r, layer.scale) for start, stop in layer.parts),
        strict=True,
    )
    for name, parts in {"A": As, "B": Bs}.items():
        for parameter in (layer.get_parameter(f"lora_{name}"), layer.get_parameter(f"start_{name}")):
            parameter.copy_(torch.cat(parts, dim=-2))


def start_from_inputs(model: GPT, config: LoRAConfig, start: Start) -> None:
    """Fill A with the directions in which the layer's inputs vary most (Paischer et al. 2024, EVA, arXiv 2410.07170).

    They are the right singular vectors of the inputs that a row of the first samples gives. `explained_ranks` gives
    layers the ranks that the paper does.

    Raises:
        UsageError: the row has fewer tokens than there are ranks.
    """

    def fill(path: str, layer: Factors, S: Tensor, Vh: Tensor) -> None:
        if len(S) < layer.r:
            raise UsageError(f"--lora_init eva: the data has {len(S)} tokens; expected as many as --lora_r {layer.r}")
        layer.lora_A.copy_(Vh[: layer.r].repeat(len(layer.parts), 1))

    decompose_inputs(model, config, start, fill)


@torch.no_grad()
def explained_ranks(model: GPT, config: LoRAConfig, start: Start, rho: float) -> dict[str, int]:
    """Return ranks of the layers by how much of the variance of their inputs they explain (EVA, section 3.3).

    All projections have `config.r` ranks on average. Each goes to the layer whose next singular value explains the
    largest share of its inputs' variance, up to rho times `config.r` in one layer.

    Args:
        model: with LoRA attached.

    Returns:
        {path: rank}, 0 for a layer that is left out.
    """
    shares: list[tuple[float, str]] = []
    most = int(rho * config.r)

    def explain(path: str, layer: Factors, S: Tensor, Vh: Tensor) -> None:
        squares = S.double().square()
        shares.extend((float(share), path) for share in squares[:most] / squares.sum())

    decompose_inputs(model, config, start, explain)
    layers = lora_layers(model)
    ranks, left = dict.fromkeys(layers, 0), config.r * sum(len(layer.parts) for layer in layers.values())
    for _, path in sorted(shares, reverse=True):
        if (taken := len(layers[path].parts)) <= left:
            ranks[path], left = ranks[path] + 1, left - taken
    return ranks


def decompose_inputs(
    model: GPT, config: LoRAConfig, start: Start, use: Callable[[str, Factors, Tensor, Tensor], None]
) -> None:
    """Call a function with the singular values (n,) and right vectors (n, in_features) of each adapted layer's inputs.

    Args:
        use: takes the path, the layer, and both in float32.
    """
    rows: list[int] = []
    tokens = 0
    while tokens < EVA_TOKENS and len(rows) < start.samples:
        rows.append(len(rows))
        tokens += start.row(rows[-1:]).tokens

    def decompose(path: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, Factors)
        _, S, Vh = torch.linalg.svd(inputs[0].flatten(0, -2).float(), full_matrices=False)
        use(path, layer, S, Vh)

    hooks = [layer.register_forward_pre_hook(partial(decompose, path)) for path, layer in lora_layers(model).items()]
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
