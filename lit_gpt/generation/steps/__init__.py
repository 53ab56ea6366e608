"""Chooses the fastest step of one token that the model and its device allow."""

from functools import partial

from torch import Tensor

from lit_gpt.generation.sequence import DecodingRow, Step, eager_step
from lit_gpt.generation.steps.compiled import CompiledStep
from lit_gpt.generation.steps.graph import GraphStep
from lit_gpt.generation.steps.native import NativeStep
from lit_gpt.generation.steps.tape import Unsupported
from lit_gpt.kernels.cuda.launch import serves_on
from lit_gpt.model.gpt import GPT
from lit_gpt.model.kv_cache import KVCache


class FastStep:
    """Takes the fastest Step that serves the model.

    That is NativeStep on a CPU, GraphStep on CUDA, if they know all that the model is made of: they are ready at once,
    so that no answer is too short for them. Else it is CompiledStep, if `compile` asks for it, for it takes seconds
    before it is ready; or the model's own operations.

    Raises:
        UsageError: `compile` asks for what cannot be compiled.
    """

    def __init__(self, model: GPT, compile: bool = False) -> None:
        self.model = model
        self.chosen: Step | None = None
        self.otherwise: Step = CompiledStep(model) if compile else partial(eager_step, model)

    def __call__(self, rows: list[DecodingRow], cache: KVCache) -> Tensor:
        if self.chosen is self.otherwise:
            return self.otherwise(rows, cache)
        try:  # not before: the first token, which comes from the prompt, need not wait for it
            return self.choose(cache)(rows, cache)
        except Unsupported:
            self.chosen = self.otherwise
            return self.otherwise(rows, cache)

    def draw(self, rows: list[DecodingRow], cache: KVCache) -> list[int] | None:
        """Return the token that follows each row, if the step draws tokens on the device; else None."""
        if self.chosen is self.otherwise:
            return None
        try:
            step = self.choose(cache)
            return step.draw(rows, cache) if isinstance(step, GraphStep) else None
        except Unsupported:
            self.chosen = self.otherwise
            return None

    def choose(self, cache: KVCache) -> Step:
        """Return the step that serves as many rows as the cache has; raise Unsupported if none does."""
        if self.chosen is None:
            self.chosen = (GraphStep if serves_on(self.model.wte.weight) else NativeStep)(self.model, cache[0].rows)
        return self.chosen
