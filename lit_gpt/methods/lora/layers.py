"""The layers that LoRA wraps: the base's product, and beside it the update's."""

import torch
from torch import Tensor

from lit_gpt.kernels import functional
from lit_gpt.kernels.dropout import dropout
from lit_gpt.methods.decoding_tape import DecodingTape
from lit_gpt.methods.lora.factors import Factors
from lit_gpt.model.gpt import GPT
from lit_gpt.model.linear import Linear
from lit_gpt.model.moe import Routing, grouped_product
from lit_gpt.quantization.modules import QuantizedLinear, weight_of


class LoRALayer(Factors):
    """Holds low-rank updates of some rows of a layer, in float32; for products they are cast to the input's dtype."""

    @torch.no_grad()
    def merged(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the base's weight plus the updates, in the weight's shape, computed in float32.

        Args:
            dtype: of the sum; None: the base's. Where the base is quantized, the updates are added to the dequantized
                weight, and the sum stays float32.
        """
        base = weight_of(self.linear)
        weight = base.to(torch.float32, copy=True)  # the original may be tied, or mapped
        for (start, stop), A, B in self.pairs():
            weight[..., start:stop, :] += self.scale * (B @ A)
        if self.magnitude is not None:
            for (start, stop), lengths in zip(self.parts, self.magnitude.split(self.sizes), strict=True):
                rows = weight[start:stop]
                rows *= (lengths / rows.norm(dim=1)).unsqueeze(1)
        return weight.to(dtype or base.dtype)

    def merged_parameter(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return the layer's weight as `merged` does, or another parameter of the base."""
        return self.merged(dtype) if name == "weight" else self.linear.get_parameter(name).detach()

    def whole_weight(self) -> Tensor | None:
        """Return the weight that the output is the input's product by; None where the output is no such product, or the
        base is quantized.
        """
        return self.merged() if type(self.linear) is Linear and self.bias_shift is None else None

    @torch.no_grad()
    def shifted_zeros(self) -> Tensor | None:
        """Return the zero points of int4 (out_features, groups) with the update in them, in their dtype.

        None where the update is not one of zero points, or the base has none.
        """
        linear = self.linear
        if self.config.update != "qa" or not isinstance(linear, QuantizedLinear) or linear.format != "int4":
            return None
        zero = linear.get_parameter("zero")
        shifted = zero.to(torch.float32, copy=True)  # the base may serve on
        halves = zip(self.parts, self.lora_A.split(self.r), self.lora_B.split(self.sizes), strict=True)
        for (start, stop), A, B in halves:
            shifted[start:stop] += self.scale * (B @ A)
        return shifted.to(zero.dtype)


class LoRALinear(LoRALayer):
    """A linear layer with low-rank updates."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        A, B = self.factors()
        keys = self.dropout_keys(len(rows), x.device)
        y = self.linear(rows)  # of rows it is no view even with a bias, and views are dear to change in place
        y = functional.low_rank_update(y, rows, A, B, self.parts, self.scale, self.dropout, keys)
        scale = self.output_scale(A, B)
        if scale is not None:
            y = functional.scaled(y, scale, self.shift(scale))
        return y.view(*x.shape[:-1], self.out_features)

    def shift(self, scale: Tensor) -> Tensor:
        """Return what is to be added to the output before it is scaled, so that its bias stays as it is."""
        bias = getattr(self.linear, "bias", None)
        return torch.zeros_like(scale) if bias is None else bias.float() / scale - bias.float()

    def record(self, tape: DecodingTape, x: Tensor, name: str) -> Tensor:
        """Add the layer to a decoding tape."""
        A, factor = self.factors()[0], self.scale
        low = tape.lora_down(A.to(tape.dtype).contiguous(), x)
        y = tape.linear(self.linear, x, name)
        for part, (rows, _, B) in enumerate(self.pairs()):
            tape.lora_up(y, low, part * self.rank, (B * factor).to(tape.dtype).t().contiguous(), rows)
        scale = self.output_scale(*self.factors())
        if scale is not None:
            tape.scale(y, scale, self.shift(scale))
        return y


class LoRAExperts(LoRALayer):
    """A layer of experts with low-rank updates: A and B are (n_expert, ...), and each expert has its own."""

    def forward(self, x: Tensor, routes: Routing) -> Tensor:
        """Return (rows, out_features) of x (rows, in_features), whose rows are sorted by expert."""
        keys = self.dropout_keys(len(x) // routes.k, x.device)
        dropped = x if keys is None else dropout(x, keys[routes.tokens], self.dropout)
        A, B = self.factors()
        low = grouped_product(dropped, A, routes.groups).split(self.rank, dim=-1)
        parts = zip(low, B.split(self.sizes, dim=-2), strict=True)
        updates = [grouped_product(*pair, routes.groups) for pair in parts]
        return self.linear(x, routes).add(torch.cat(updates, dim=-1), alpha=self.scale)


def lora_layers(model: GPT) -> dict[str, LoRALayer]:
    """Return the layers that LoRA is attached to, by their paths."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}
