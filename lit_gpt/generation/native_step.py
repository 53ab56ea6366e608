"""The step of one more token of a few rows on a CPU, as a list of operations of lit_gpt/kernels/cpp/decode.cpp.

The list is made from the model as it stands, by walking its modules, whatever wraps them included, and holds pointers
to its weights. Running it is one call: no operator of torch, and no compiling.
"""

from itertools import chain
from operator import is_

from torch import Tensor

from lit_gpt.generation.sequence import DecodingRow
from lit_gpt.generation.tape import TYPES, Tape, Unsupported
from lit_gpt.kernels import build
from lit_gpt.model.gpt import GPT
from lit_gpt.model.kv_cache import KVCache


class NativeStep:
    """Takes a Step by the operations of a tape, with the logits of lit_gpt.generation.sequence.eager_step.

    Weights are read where they lie; what is attached to a model, and small things like norms, are copied, and copied
    again when they have changed, which is looked at when other rows are continued than before.

    Args:
        n: rows that are expected; more can follow.

    Raises:
        Unsupported: there is no kernel for some part of the model, or no compiler to make kernels.
    """

    def __init__(self, model: GPT, n: int = 1) -> None:
        library = build.library("decode")
        if library is None:
            raise Unsupported("no compiler")
        self.library, self.model = library, model
        self.slots: list[KVCache] = []  # of the rows of the last call, as are the lengths
        self.lengths: list[int] = []
        self.record(n)

    def record(self, n: int) -> None:
        if self.model.wte.weight.device.type != "cpu" or self.model.dtype not in TYPES or self.model.training:
            raise Unsupported("a device, dtype or mode")
        self.tape, self.seen = Tape(self.library, self.model, n), versions(self.model)

    def __call__(self, rows: list[DecodingRow], cache: KVCache) -> Tensor:
        """Return float32 logits (len(rows), padded_vocab_size), which the next call overwrites."""
        slots, lengths = [row.cache for row in rows], [len(row.ids) for row in rows]
        if lengths != [length + 1 for length in self.lengths] or not all(map(is_, slots, self.slots)):
            outdated = self.model.training or changed(self.seen, versions(self.model))
            if outdated or self.tape.n < len(rows):
                self.record(max(len(rows), cache[0].rows))
            self.tape.use(rows[0].cache if len(rows) == 1 else cache)
        self.slots, self.lengths = slots, lengths
        logits = self.tape.run([row.ids[-1] for row in rows], [length - 1 for length in lengths])
        for row in rows:
            row.cache[0].uses_long_rope = self.model.rope.is_long(len(row.ids))
            for layer in row.cache:
                layer.length += 1
        return logits


Versions = list[tuple[Tensor, tuple[int, ...]]]


def versions(model: GPT) -> Versions:
    """Return all that a model computes with, where each tensor lies and how often it was written to."""
    tensors = chain(model.parameters(), model.buffers())
    return [(x, (x.data_ptr(), 0 if x.is_inference() else x._version)) for x in tensors]


def changed(before: Versions, now: Versions) -> bool:
    pairs = zip(before, now, strict=False)
    return len(before) != len(now) or any(old is not new or m != n for (old, m), (new, n) in pairs)
