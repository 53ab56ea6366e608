"""Splits weights into quantized ones and a LoRA that makes up for what they lose: W = Q + s B A + error.

LoftQ (Li et al. 2023, arXiv 2310.08659) alternates Q = q(W - s B A) and s B A = the best approximation of W - Q of rank
r; the first B A is 0. From the best approximation of W itself, Q keeps what is left of it (QPiSSA, Meng et al. 2024,
arXiv 2404.02948; LQ-LoRA, Guo et al. 2023, arXiv 2311.12023, alternates from the same start). Of all rounds that with
the smallest error is taken, for each layer.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from lit_gpt.checkpoints.base_model import BaseCheckpoint, skeleton
from lit_gpt.errors import UsageError, UserError
from lit_gpt.methods import finetuned_file
from lit_gpt.methods.hyperparameters import LoRAConfig
from lit_gpt.methods.lora.attaching import targets
from lit_gpt.methods.lora.method import NAME
from lit_gpt.methods.lora.starts import pissa
from lit_gpt.quantization import formats

Parts = list[tuple[int, int]]


class Decomposition:
    """Decomposes the weights of a base's linear layers; those of the head and the embedding are quantized alone.

    Attributes:
        state: A and B as a LoRA file of `config` has them, once `tensors` has yielded all.
        errors: for each layer the norm of W - Q - s B A, and that of W - q(W), what rounding alone would lose.

    Raises:
        UsageError: a projection has no room for the rank, or the model cannot be quantized.
    """

    def __init__(self, base: BaseCheckpoint, r: int, rounds: int, start: Literal["quantize", "svd"]) -> None:
        self.base, self.rounds, self.start = base, rounds, start
        assert base.quantize is not None, "a base that is to be quantized"
        self.format = base.quantize
        self.config = LoRAConfig(r=r, alpha=r, key=True, projection=True, mlp=True)
        model = skeleton(base.config, base.dtype, base.quantize)
        self.parts = dict(targets(model, self.config))
        for path, parts in self.parts.items():
            limit = min(cast(nn.Linear, model.get_submodule(path)).in_features, *(b - a for a, b in parts))
            if r > limit:
                raise UsageError(f"--lora_r {r}: {path} has only rank {limit}; expected at most that")
        self.state: dict[str, Tensor] = {}
        self.errors: dict[str, tuple[float, float]] = {}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the state dict of the quantized model, tensor by tensor."""
        others = {name: t for name, t in self.base.state.items() if name.removesuffix(".weight") not in self.parts}
        yield from replace(self.base, state=others).quantized(self.base.dtype)
        for path in self.parts:
            encoded = self.decompose(path, self.base.state[f"{path}.weight"].float())
            yield from ((f"{path}.{key}", tensor) for key, tensor in encoded.items())

    @property
    def share(self) -> float:
        """Return the error that is left, relative to that of rounding alone: the mean over the layers."""
        return sum(left / max(lost, 1e-30) for left, lost in self.errors.values()) / len(self.errors)

    @property
    def flags(self) -> str:
        """Return the flags of finetune/lora.py for the LoRA that was found."""
        default, own = asdict(LoRAConfig()), asdict(self.config)
        return " ".join(f"--lora_{name} {str(own[name]).lower()}" for name in own if own[name] != default[name])

    def write_lora(self, folder: Path) -> None:
        """Write the LoRA file beside the quantized weights, which must lie in the folder already."""
        written = BaseCheckpoint.open(folder)
        record = {"hyperparameters": asdict(self.config), "prompt_style": self.base.prompt_style.to_dict()}
        path = folder / f"lit_model_{NAME}_finetuned.pth"
        finetuned_file.save_file(path, NAME, written.fingerprint, self.state, **record, quantize=written.quantization)

    @torch.no_grad()
    def decompose(self, path: str, weight: Tensor) -> formats.Tensors:
        """Return the tensors of the best Q of a weight, float32, and keep its A and B."""
        if not weight.isfinite().all():
            raise UserError(f"{self.base.checkpoint_dir}: {path}.weight holds values that are not numbers")
        parts = self.parts[path]
        plain = self.encoded(weight)
        rounding = (weight - self.decoded(plain, weight)).norm().item()
        found = None if self.start == "quantize" else self.low_rank(weight, parts)  # None: B A is 0
        best, kept, pair = math.inf, plain, found
        for _ in range(self.rounds):
            encoded = plain if found is None else self.encoded(weight - self.update(found, parts, weight))
            lost = weight - self.decoded(encoded, weight)
            found = self.low_rank(lost, parts)
            error = (lost - self.update(found, parts, weight)).norm().item()
            if pair is None or error < best:
                best, kept, pair = error, encoded, found
        assert pair is not None, "there is a round"
        self.state |= {f"{path}.lora_A": pair[0], f"{path}.lora_B": pair[1]}
        self.errors[path] = best, rounding
        return kept

    def encoded(self, weight: Tensor) -> formats.Tensors:
        return formats.encode(weight, self.format, self.base.dtype)

    def decoded(self, encoded: formats.Tensors, like: Tensor) -> Tensor:
        return formats.decode(encoded, self.format, like.size(1), torch.float32)

    def low_rank(self, weight: Tensor, parts: Parts) -> tuple[Tensor, Tensor]:
        """Return A and B of each part, one below the other: the best approximations of their rank."""
        pairs = [pissa(weight[start:stop], self.config.r, self.config.scale) for start, stop in parts]
        return torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs])

    def update(self, pair: tuple[Tensor, Tensor], parts: Parts, like: Tensor) -> Tensor:
        """Return s B A in the rows of the layer that are adapted, and zeros in the others."""
        update, (A, B) = torch.zeros_like(like), pair
        sizes = [stop - start for start, stop in parts]
        for (start, stop), a, b in zip(parts, A.split(self.config.r), B.split(sizes), strict=True):
            update[start:stop] = self.config.scale * (b @ a)
        return update
