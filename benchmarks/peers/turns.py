"""Contestants that work in one process take turns, so that all meet the same state of the machine."""

import time
from collections.abc import Callable
from typing import Any


def take_turns(
    title: str,
    contestants: dict[str, Callable[[], Any]],
    rounds: int,
    check: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, list[float]]:
    """Let each work once in turn; return the seconds of the rounds that count, which are those after the first.

    Args:
        check: looks at what the contestants return in the first round.
    """
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        found = {}
        for name, work in contestants.items():
            start = time.perf_counter()
            found[name] = work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
        if turn == 0:
            check(found)
        print(f"{title} {turn} of {rounds}: " + ", ".join(f"{n} {s[-1]:.3f} s" for n, s in seconds.items()), flush=True)
    return {name: times[1:] for name, times in seconds.items()}
