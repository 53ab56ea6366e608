"""Says how many optimizer steps a run takes, and the learning rate of each."""

import math
from dataclasses import dataclass

from lit_gpt.errors import UsageError
from lit_gpt.training.args import BatchArgs, OptimizationArgs

WARMUP_STEPS = 100  # unless told otherwise, in runs that are three times as long or longer


@dataclass(frozen=True)
class Schedule:
    """Raises the learning rate linearly, then lets it fall along half a cosine to `floor`, or stay.

    Attributes:
        steps: how many optimizer steps the run has.
        samples: how many samples these take together.
    """

    steps: int
    samples: int
    warmup: int
    peak: float
    floor: float = 0.0
    shape: str = "cosine"

    @classmethod
    def from_args(cls, args: OptimizationArgs, batch: BatchArgs, n: int) -> "Schedule":
        """Return the schedule of a run over n samples.

        Raises:
            UsageError: the warmup is no shorter than the run, or min_lr is above the peak.
        """
        samples = args.max_steps * batch.batch_size if args.max_steps else max(1, round(args.epochs * n))
        steps = math.ceil(samples / batch.batch_size)
        warmup = min(WARMUP_STEPS, steps // 3) if args.warmup_steps is None else args.warmup_steps
        if warmup >= steps:
            raise UsageError(
                f"--warmup_steps {warmup}: expected fewer than the run's {steps} steps, such as {steps // 10}"
            )
        if args.min_lr > args.learning_rate:
            raise UsageError(f"--min_lr {args.min_lr}: expected at most --learning_rate {args.learning_rate}")
        return cls(steps, samples, warmup, args.learning_rate, args.min_lr, args.schedule)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.shape == "constant":
            return self.peak
        cosine = 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup)))
        return self.floor + (self.peak - self.floor) * cosine
