"""Kernels of a decoding step besides its products: activations are float32 (rows, size), positions on the device."""
