"""The Triton kernels that training takes in place of torch's operations, see lit_gpt.kernels.functional."""

from lit_gpt.kernels.cuda.cross_entropy import cross_entropy_
from lit_gpt.kernels.cuda.gates import gated, gated_backward
from lit_gpt.kernels.cuda.lora import lora_, lora_backward, supports_lora
from lit_gpt.kernels.cuda.norms import Norm, norm, norm_backward
from lit_gpt.kernels.cuda.rotary import rotate_, rotated, supports_rotation
from lit_gpt.kernels.cuda.scaled import scaled, scaled_backward, sum_of_three

__all__ = [
    "Norm", "cross_entropy_", "gated", "gated_backward", "lora_", "lora_backward", "norm", "norm_backward", "rotate_",
    "rotated", "scaled", "scaled_backward", "sum_of_three", "supports_lora", "supports_rotation",
]  # fmt: skip
