"""Says what a run over prepared data feeds, before it starts: its longest packed row, its steps and its tokens."""

import math
from dataclasses import dataclass

from lit_gpt.data.dataset import prefixed
from lit_gpt.data.packing import longest_row, step_samples
from lit_gpt.training.memory.plan import MemoryPlanner, Row
from lit_gpt.training.schedule import Schedule


@dataclass(frozen=True)
class RunSize:
    """Holds the size of a run.

    Attributes:
        row: the longest packed row that any rank computes in an epoch.
        longest: tokens of the longest sample, without virtual ones.
        steps: optimizer steps.
        tokens: fed to all ranks, over all steps.
    """

    row: Row
    longest: int
    steps: int
    tokens: int

    @classmethod
    def of(cls, planner: MemoryPlanner) -> "RunSize":
        """Return the size of the run that a planner plans, over its `--data_dir`.

        Raises:
            UserError: the folder is no prepared data.
        """
        args, (split, _) = planner.args, planner.objective.datasets(planner.args.paths.data_dir)
        train = prefixed(split, planner.method.virtual_ids(planner.config))
        batch, n, lengths = args.batch, len(train), train.lengths
        schedule = Schedule.from_args(args.optimization, batch, n)
        whole, rest = divmod(schedule.samples, n)
        epoch = range(min(schedule.steps, math.ceil(n / batch.batch_size)))
        steps = (step_samples(n, batch.batch_size, args.optimization.seed, step, schedule.samples) for step in epoch)
        shares = (step[rank :: args.devices.ranks] for step in steps for rank in range(args.devices.ranks))
        tokens = None if batch.micro_batch_size else batch.micro_batch_tokens or planner.row_tokens()
        row = longest_row(shares, lengths, (batch.micro_batch_size, tokens))
        # the last epoch's share is an estimate: by the mean length
        fed = round((whole + rest / n) * (sum(lengths) - n))
        weight = planner.objective.weight(train[i] for i in row)
        return cls(([lengths[i] - 1 for i in row], weight), max(split.lengths) - 1, schedule.steps, fed)
