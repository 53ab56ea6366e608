"""What a step of LoRA must compute, counted from the model's shapes: the least that any implementation can do.

Multiplications and additions of the matrix products, two for each pair. Not counted: elementwise work, the optimizer.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from lit_gpt import GPT, Config
from lit_gpt.methods import lora


class StepFlops:
    """Counts for one model and one choice of adapted projections."""

    def __init__(self, config: Config, adapted: lora.LoRAConfig) -> None:
        self.config = config
        with torch.device("meta"):
            model = GPT(config)
        blocks = {name: m for name, m in model.named_modules() if name.startswith("h.") and isinstance(m, nn.Linear)}
        self.linears = {name: (m.in_features, m.out_features) for name, m in blocks.items()}
        self.updates = sum(
            adapted.r * (self.linears[path][0] + stop - start)
            for path, parts in lora.targets(model, adapted)
            for start, stop in parts
        )

    def parts(self, lengths: Sequence[int], supervised: int) -> dict[str, int]:
        """FLOPs by purpose, of samples that feed so many tokens each and supervise so many together."""
        tokens, weights = sum(lengths), sum(k * n for k, n in self.linears.values())
        first_k, first_n = self.linears["h.0.attn.qkv"]  # nothing trains below it: its input needs no gradient
        pairs = sum(n * (n + 1) // 2 for n in lengths)  # of a query and a key that it sees
        attention = self.config.n_layer * self.config.n_head * self.config.head_size * pairs
        return {
            "frozen weights, forward": 2 * weights * tokens,
            "frozen weights, input gradients": 2 * (weights - first_k * first_n) * tokens,
            "LoRA, forward and backward": 6 * self.updates * tokens,
            "head at supervised positions": 4 * self.config.n_embd * self.config.padded_vocab_size * supervised,
            "attention, forward and backward": 12 * attention,  # two products forward, four backward
        }

    def shapes(self, tokens: int, supervised: int) -> list[tuple[int, int, int, int]]:
        """(rows, in, out, how often) of the frozen layers' products."""
        head = (supervised, self.config.n_embd, self.config.padded_vocab_size, 1)
        return [*((tokens, *size, count) for size, count in Counter(self.linears.values()).items()), head]
