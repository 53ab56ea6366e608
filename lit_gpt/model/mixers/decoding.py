"""What a token mixer may add to a decoding tape, so that the fast decoding step computes it.

A mixer that defines `record(tape, x, layer)` calls these operations and returns the buffer with what the layer `proj`
gives. A model with a mixer that has no `record` is decoded by PyTorch. The tape itself is
lit_gpt.generation.steps.tape.Tape; its operations by name are those of lit_gpt/kernels/cpp/decode.cpp.
"""

from typing import Protocol

from torch import Tensor, nn

from lit_gpt.model.mixers.convolution import CausalConvolution


class MixerTape(Protocol):
    """Takes the operations of one decoding step. Activations are float32 (rows, size) buffers, or columns of them.

    A layer's cache is a StateCache of a float32 state and a convolution's tail, or of a tail alone.
    """

    def add(self, operation: str, *arguments: Tensor | float | None) -> None:
        """Add an operation by its name; of what is not contiguous a row is given, and how far apart rows are."""

    def buffer(self, name: str, size: int) -> Tensor:
        """Return a buffer, which all layers share."""

    def linear(self, layer: nn.Module, x: Tensor, name: str) -> Tensor:
        """Apply a linear layer, or what wraps one, to x, and return the buffer `name` that holds the output."""

    def norm(self, norm: nn.Module, x: Tensor, name: str | None, parts: int = 1) -> Tensor:
        """Normalize each of so many parts of x, and return the buffer `name`; without a name, x itself is changed."""

    def activate(self, y: Tensor, activation: str) -> None:
        """Apply an activation by its name to y, in place."""

    def scale(self, y: Tensor, scale: Tensor, shift: Tensor) -> None:
        """Replace y by scale * (y + shift), both float32 (size,)."""

    def multiply(self, y: Tensor, x: Tensor, by: Tensor, gate: str = "identity") -> None:
        """Set y to x times a function of `by`: "identity", "sigmoid" or "swish"; x is all of y, or another buffer."""

    def convolve(self, convolution: CausalConvolution, x: Tensor, layer: int) -> Tensor:
        """Convolve x with the tail in a layer's cache, which takes it in, and return the buffer with the output."""
