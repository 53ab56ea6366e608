"""Checks a run's claims on its own checkpoint, data and settings, before it trains."""

from collections.abc import Iterator
from typing import Any

from lit_gpt.checkpoints.base_model import BaseCheckpoint
from lit_gpt.data.dataset import Samples
from lit_gpt.distributed.fabric import Fabric
from lit_gpt.methods.method import Method
from lit_gpt.training.args import TrainArgs
from lit_gpt.training.checks import check_one_device
from lit_gpt.training.objectives import Objective
from lit_gpt.training.selfcheck.data import check_data
from lit_gpt.training.selfcheck.finding import Finding
from lit_gpt.training.selfcheck.model import check_model
from lit_gpt.training.selfcheck.subject import open_subject


def check_run(
    args: TrainArgs, method: Method, fabric: Fabric, base: BaseCheckpoint, objective: Objective, train: Samples,
    meta: dict[str, Any],
) -> Iterator[Finding]:  # fmt: skip
    """Yield what each check finds, on a model of its own.

    Args:
        meta: the contents of the data folder's data.json.

    Raises:
        UsageError: the run has several devices.
    """
    check_one_device(fabric.world_size)
    subject = open_subject(args, method, fabric, base, objective, train, meta)
    yield from check_data(subject, train)
    yield from check_model(subject)
