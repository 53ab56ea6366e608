"""Keys and values of sequences that have ended, for those that begin alike: a chat's next turn, a shared prompt."""

from collections.abc import Callable
from typing import NamedTuple

from lit_gpt.generation.engine import Batch
from lit_gpt.generation.sequence import DecodingRow, Step
from lit_gpt.model.gpt import GPT
from lit_gpt.model.kv_cache import KVCache, copy_cache, row_view, truncate
from lit_gpt.text.prompt_style import common_prefix

WORTHWHILE = 8  # tokens: fewer are read as fast as copied


class Kept(NamedTuple):
    """A sequence that has been computed, under a LoRA."""

    lora: int
    ids: list[int]
    cache: KVCache


class Prefixes:
    """Keeps what has ended, the least recently used only as long as there is room.

    Args:
        cache: a slot for each sequence that is kept, with as much room as those of the batch; None: nothing is kept.
    """

    def __init__(self, cache: KVCache | None) -> None:
        self.free = [row_view(cache, i) for i in range(cache[0].rows)] if cache else []
        self.kept: list[Kept] = []  # the least recently used first

    def keep(self, row: DecodingRow) -> None:
        """Keep a row's tokens, in the place of what it has grown from."""
        ids = row.ids[: row.cache[0].length]
        if not ids:
            return
        for i, kept in enumerate(self.kept):
            if kept.lora == row.lora and kept.ids[: len(ids)] == ids:
                return self.kept.append(self.kept.pop(i))
        grown = [kept for kept in self.kept if kept.lora == row.lora and ids[: len(kept.ids)] == kept.ids]
        if grown:
            self.kept.remove(grown[0])
            slot = grown[0].cache
        elif self.free or self.kept:
            slot = self.free.pop() if self.free else self.kept.pop(0).cache
        else:
            return
        copy_cache(row.cache, slot)
        self.kept.append(Kept(row.lora, ids, slot))

    def fill(self, slot: KVCache, row: DecodingRow, model: GPT, active: list[DecodingRow]) -> int:
        """Copy into a slot as much of a row's beginning as is known, and return how many tokens that is.

        Args:
            active: rows that are continued, whose beginnings serve as well.
        """
        best, length = None, WORTHWHILE - 1
        for kept in (*self.kept, *map(computed, active)):
            if (n := shared(row, kept, model)) > length:
                best, length = kept, n
        if best is None:
            return 0
        copy_cache(best.cache, slot)
        truncate(slot, length)
        if best in self.kept:
            self.kept.append(self.kept.pop(self.kept.index(best)))
        return length


def shared(row: DecodingRow, kept: Kept, model: GPT) -> int:
    """Return how many tokens a row begins with that are kept as it needs them, never all of its tokens."""
    if kept.lora != row.lora or not kept.ids or model.needs_reread(kept.cache[0], len(row.ids)):
        return 0
    length = min(common_prefix(kept.ids, row.ids), len(row.ids) - 1)
    return length if all(layer.can_return_to(length) for layer in kept.cache) else 0


def computed(row: DecodingRow) -> Kept:
    return Kept(row.lora, row.ids[: row.cache[0].length], row.cache)


class SharingBatch(Batch):
    """A batch whose rows begin with what is known of them already. For the other arguments see Batch."""

    def __init__(
        self,
        model: GPT,
        cache: KVCache,
        step: Step | None,
        choose: Callable[[list[DecodingRow]], None],
        piece: int | None,
        prefixes: Prefixes,
    ) -> None:
        super().__init__(model, cache, step, choose, piece)
        self.prefixes = prefixes

    def join(self, row: DecodingRow) -> None:
        slot = self.slots[len(self.rows)]
        row.cached = self.prefixes.fill(slot, row, self.model, self.rows)
        super().join(row)

    def leave(self, row: DecodingRow) -> None:
        self.prefixes.keep(row)
        super().leave(row)
