"""Files written whole or not at all, and the columns of the one that a run adds to.

Nothing here imports torch: scripts/report.py answers at once.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COLUMNS = ("step", "tokens", "loss", "val_loss", "lr", "tokens_per_second", "peak_memory_bytes")  # of metrics.csv


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, file or folder, when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
