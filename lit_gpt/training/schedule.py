"""How many optimizer steps a run takes, and the learning rate of each."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

from lit_gpt.errors import UsageError


@dataclass(frozen=True)
class Schedule:
    """How many steps, and the learning rate of each: linear warmup, then half a cosine down to zero, or constant."""

    steps: int
    samples: int
    warmup: int
    peak: float
    shape: str = "cosine"

    @classmethod
    def of(cls, hp: SimpleNamespace, n: int) -> "Schedule":
        samples = hp.max_steps * hp.batch_size if hp.max_steps else hp.epochs * n
        steps = math.ceil(samples / hp.batch_size)
        if hp.warmup_steps >= steps:
            raise UsageError(
                f"--warmup_steps {hp.warmup_steps}: expected fewer than the run's {steps} steps, such as {steps // 10}"
            )
        return cls(steps, samples, hp.warmup_steps, hp.learning_rate, hp.schedule)

    def learning_rate(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.shape == "constant":
            return self.peak
        return self.peak * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup)))
