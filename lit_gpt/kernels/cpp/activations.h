// The activations that the kernels know; lit_gpt/kernels/declarations.py reads their numbers here.
#pragma once

enum Activation { GELU, GELU_TANH, RELU, RELU2, SILU };
