"""Counts the cores that this process can keep busy. Nothing here imports torch."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def usable_cores(root: Path = Path("/"), cpus: set[int] | None = None) -> int:
    """Return how many physical cores the process may use, by its set of CPUs and its control groups' time.

    Two threads of one core share what computes: a second one of them waits for the first.

    Args:
        root: where the system's files are.
        cpus: numbers of the CPUs that the process may run on; None: as the system says.
    """
    if cpus is None:
        cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_siblings(root, cpu) for cpu in cpus}
    return max(1, min([len(cores), *map(math.ceil, _quotas(root))]))


def _siblings(root: Path, cpu: int) -> str:
    """Return what all CPUs of one core have in common."""
    try:
        return (root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _quotas(root: Path) -> Iterator[float]:
    """Yield how many CPUs' time each control group above the process may take, of those that have a limit."""
    groups = root / "sys/fs/cgroup"
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers not in ("", "cpu", "cpu,cpuacct"):
                continue
            place = groups / controllers / name.strip("/")
            for folder in (place, *place.parents[: len(place.parents) - len(groups.parents)]):
                yield from _quota(folder)


def _quota(folder: Path) -> Iterator[float]:
    with suppress(OSError, ValueError):  # "max" is no limit
        quota, period = (folder / "cpu.max").read_text().split()  # version 2
        yield int(quota) / int(period)
    with suppress(OSError, ValueError):
        allowed = int((folder / "cpu.cfs_quota_us").read_text())  # version 1, where -1 is no limit
        if allowed > 0:
            yield allowed / int((folder / "cpu.cfs_period_us").read_text())
