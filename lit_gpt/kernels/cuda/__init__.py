"""Triton kernels for CUDA devices; what each computes is the plain formula's in lit_gpt.kernels.functional.

`ops` has those that training chooses by `lit_gpt.kernels.functional.serving`. TRITON_INTERPRET=1 lets Triton run them
on a CPU, which tests do.
"""
