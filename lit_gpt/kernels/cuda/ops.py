"""The Triton kernels that training takes in place of torch's operations, see lit_gpt.kernels.functional."""

from lit_gpt.kernels.cuda.norms import Norm, norm, norm_backward

__all__ = ["Norm", "norm", "norm_backward"]
