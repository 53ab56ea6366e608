"""LoRA files beside a base that is being served: read when they are asked for, and again when they had to leave.

What they take is bounded, whatever is asked for: the pool has a limit, of which each row of the batch has a share that
no file may exceed, so that a row whose turn has come always finds room for its LoRA.
"""

import os
import sys
import traceback
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from lit_gpt.errors import UserError
from lit_gpt.methods.multi_lora import LoadedLoRA, LoRAPool

Stamp = tuple[int, int, int]


def stamp_of(path: Path) -> Stamp | None:
    """Return what tells a file from what replaces it, or None if there is no file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


class Adapters:
    """Keeps LoRAs in memory by number as long as there is room, and reads them on a thread of its own.

    Args:
        limit: bytes that they may take together.
        rows: how many may be wanted at once.

    Attributes:
        in_use: tells the numbers that rows in the batch have.
        reads: how many files have been read.
    """

    def __init__(self, pool: LoRAPool, limit: int, rows: int) -> None:
        self.pool, self.limit, self.rows = pool, limit, rows
        self.share = limit // (rows + 1)  # one is that which is being compared with the base
        pool.limit = limit
        self.in_use: Callable[[], Collection[int]] = set
        self.reading = ThreadPoolExecutor(1, "adapters")
        self.files: dict[int, tuple[Path, Stamp]] = {}  # those that are served, by number
        self.reads = 0

    def read(self, path: Path) -> tuple[LoadedLoRA, Stamp]:
        """Read a file's LoRA.

        Raises:
            UserError: it cannot be used, or was replaced meanwhile.
        """
        stamp = stamp_of(path)
        self.reads += 1
        try:
            one = self.pool.read(path)
        except UserError:
            raise
        except Exception as error:  # a damaged file can make its reader fail in any way
            traceback.print_exc(file=sys.stderr)
            raise UserError(f"{path}: not a LoRA file ({type(error).__name__}: {error}); make it again") from None
        if stamp is None or stamp != stamp_of(path):
            raise UserError(f"{path}: was replaced while it was read; ask again")
        if one.nbytes > self.share:
            raise UserError(
                f"{path}: takes {one.nbytes} bytes, and --lora_bytes {self.limit} leaves {self.share} for each of "
                f"{self.rows} answers and one more; raise --lora_bytes to {one.nbytes * (self.rows + 1)}"
            )
        return one, stamp

    def add(self, one: LoadedLoRA, number: int | None = None) -> int:
        """Take a LoRA into memory, in place of those that have not been used for longest, and return its number."""
        return self.pool.add(one, number, self.in_use())

    def drop(self, number: int) -> None:
        """Serve a LoRA no more. Rows that go through it are continued."""
        self.files.pop(number, None)
        if number not in self.in_use():
            self.pool.remove(number)

    def fetch(self, number: int) -> "Future[LoadedLoRA] | None":
        """Begin to read a LoRA that has left, and return what comes of it; None: it is in memory."""
        if not number or number in self.pool.loaded:
            return None
        return self.reading.submit(self._read_again, number)

    def _read_again(self, number: int) -> LoadedLoRA:
        path, stamp = self.files.get(number, (None, None))
        one, now = self.read(path) if path else (None, None)
        if one is None or now != stamp:
            raise UserError("its file was replaced while the request waited; ask again")
        return one
