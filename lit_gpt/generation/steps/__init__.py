"""Chooses the fastest step of one token that the model and its device allow."""

from functools import partial

from torch import Tensor

from lit_gpt.generation.sequence import DecodingRow, Step, eager_step
from lit_gpt.generation.steps.compiled import CompiledStep
from lit_gpt.generation.steps.native import NativeStep
from lit_gpt.generation.steps.tape import Unsupported
from lit_gpt.model.gpt import GPT
from lit_gpt.model.kv_cache import KVCache


class FastStep:
    """Takes the fastest Step that serves the model.

    That is NativeStep on a CPU, if it knows all that the model is made of: it is ready at once, so that no answer is
    too short for it. Else it is CompiledStep, if `compile` asks for it, for it takes seconds before it is ready; or the
    model's own operations.

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
            self.chosen = self.chosen or NativeStep(self.model, cache[0].rows)
            return self.chosen(rows, cache)
        except Unsupported:
            self.chosen = self.otherwise
            return self.otherwise(rows, cache)
