"""A queue that takes turns among those who ask, so that none waits for all that another has asked for."""

from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Holds items by owner. Owners take turns; what one owner has asked for comes in its order."""

    def __init__(self) -> None:
        self.owners: dict[str, deque[T]] = {}  # in the order of their turns
        self.size = 0  # a number of its own, which another thread may read at any time

    def __len__(self) -> int:
        return self.size

    def push(self, owner: str, items: Sequence[T]) -> None:
        self.owners.setdefault(owner, deque()).extend(items)
        self.size += len(items)

    def pop(self) -> T:
        """Return the next item; whose it was has its next turn after the others."""
        owner, items = next(iter(self.owners.items()))
        del self.owners[owner]
        item = items.popleft()
        self.size -= 1
        if items:
            self.owners[owner] = items
        return item

    def remove(self, item: T) -> bool:
        """Take out an item, and return whether it was there."""
        for owner, items in self.owners.items():
            if item in items:
                items.remove(item)
                self.size -= 1
                if not items:
                    del self.owners[owner]
                return True
        return False
