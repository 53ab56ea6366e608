"""GLoRA (Chavan et al. 2023, arXiv 2306.07967): a low-rank update of the weight, and a low-rank scale of it.

W' = W + s W * (D C) + s B A, elementwise in the first product, and where there is a bias b' = b + b * d + e + W c. Of
the paper's choices the matrices are of low rank here, and what changes the bias are vectors. Of a weight so changed
there is no other form than itself: it is made in every pass, and its gradient is as large as in full finetuning.
"""

import torch
from torch import Tensor, nn

from lit_gpt.kernels import linear
from lit_gpt.methods.decoding_tape import DecodingTape
from lit_gpt.methods.lora.layers import LoRALayer
from lit_gpt.model.linear import Linear


class GLoRALinear(LoRALayer):
    """A linear layer whose weight and bias are made anew."""

    def forward(self, x: Tensor) -> Tensor:
        bias = self.made_bias()
        return linear.linear(x, self.made_weight().to(x.dtype), None if bias is None else bias.to(x.dtype))

    def made_weight(self) -> Tensor:
        """Return W' (out_features, in_features) in float32, of which only the adapted rows are others than W's."""
        assert self.scale_A is not None and self.scale_B is not None
        weight, pieces, at = self.base_weight(), list[Tensor](), 0
        scales = zip(self.scale_A.split(self.r), self.scale_B.split(self.sizes), strict=True)
        for ((start, stop), A, B), (C, D) in zip(self.pairs(), scales, strict=True):
            rows = weight[start:stop].float()
            pieces += [weight[at:start].float(), rows + self.scale * (rows * (D @ C) + B @ A)]
            at = stop
        return torch.cat([*pieces, weight[at:].float()])

    def made_bias(self) -> Tensor | None:
        """Return b' (out_features,) in float32, or None where there is no bias."""
        if self.bias_scale is None or self.bias_shift is None or self.bias_mix is None:
            return None
        bias, weight = self.linear.get_parameter("bias").float(), self.base_weight()
        vectors = (self.bias_scale.split(self.sizes), self.bias_shift.split(self.sizes), self.bias_mix)
        pieces, at = list[Tensor](), 0
        for (start, stop), d, e, c in zip(self.parts, *vectors, strict=True):
            own = bias[start:stop]
            pieces += [bias[at:start], own + own * d + e + weight[start:stop].float() @ c]
            at = stop
        return torch.cat([*pieces, bias[at:]])

    @torch.no_grad()
    def merged(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight, in `dtype` or the base's; of a quantized base float32."""
        kept = self.linear.weight.dtype if isinstance(self.linear, nn.Linear) else torch.float32
        return self.made_weight().to(dtype or kept)

    @torch.no_grad()
    def merged_parameter(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        bias = self.made_bias() if name == "bias" else None
        return super().merged_parameter(name, dtype) if bias is None else bias

    @torch.no_grad()
    def record(self, tape: DecodingTape, x: Tensor, name: str) -> Tensor:
        """Add the layer to a decoding tape, made once."""
        made, bias = Linear(self.in_features, self.out_features, bias=False, device="meta"), self.made_bias()
        made.weight = nn.Parameter(self.made_weight().to(tape.dtype), requires_grad=False)
        made.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        return tape.linear(made, x, name)
