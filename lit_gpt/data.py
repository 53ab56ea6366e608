"""Prepared data: rows tokenized once, kept on disk, mapped, and packed into the rows of training.

A data folder holds `train.safetensors` and `validation.safetensors`, each with

    tokens      int32 (total,)   the samples one after another
    offsets     int64 (n + 1,)   where each begins
    supervised  uint8 (total,)   1 where the token is to be learnt

and `data.json`: the audit, the prompt style and the tokenizer's fingerprint, which is checked when the data is used.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_gpt.attention import Segments
from lit_gpt.checkpoint import save_safetensors_streamed
from lit_gpt.errors import UserError
from lit_gpt.model import Targets
from lit_gpt.prompts import PromptStyle
from lit_gpt.tokenizer import Tokenizer

FORMAT_VERSION = 1
SPLITS = ("train", "validation")


@dataclass
class Audit:
    """What became of the rows: nothing is dropped or cut without being counted here."""

    dropped: Counter[str] = field(default_factory=Counter)  # reason: rows
    lengths: Counter[int] = field(default_factory=Counter)  # tokens: kept rows of so many
    supervised: int = 0  # tokens
    truncated: int = 0  # rows cut to max_seq_length
    lost_end: int = 0  # rows whose answer lost its end token, or never had one
    displaced: int = 0  # answers that do not follow the tokens which generation would see before them
    rewritten: int = 0  # answers that the template does not show in full, and which are not learnt
    left_out: int = 0  # rows of which the template leaves another message or a tool out
    unsupervised: int = 0  # rows in which no token is supervised
    first_unsupervised: str = ""  # where the first of these stands

    def drop(self, reason: str, rows: int = 1) -> None:
        self.dropped[reason] += rows

    def summary(self) -> dict[str, Any]:
        lengths, rows = sorted(self.lengths), self.lengths.total()
        tokens = sum(length * n for length, n in self.lengths.items())
        return {
            "rows_kept": rows,
            "rows_dropped": dict(self.dropped),
            "tokens": tokens,
            "tokens_supervised": self.supervised,
            "length_mean": round(tokens / rows, 1) if rows else 0,
            "length_median": self.median(),
            "length_max": lengths[-1] if lengths else 0,
            "rows_truncated": self.truncated,
            "rows_without_end_token": self.lost_end,
            "answers_after_another_prompt": self.displaced,
            "answers_not_shown_in_full": self.rewritten,
            "rows_not_shown_in_full": self.left_out,
            "rows_without_supervised_token": self.unsupervised,
        }

    def median(self) -> float:
        """Of the lengths; between two, their mean."""
        rows, seen, middle = self.lengths.total(), 0, []
        for length in sorted(self.lengths):
            seen += self.lengths[length]
            if 2 * seen >= rows:
                middle.append(length)
            if 2 * seen > rows:
                break
        return sum(middle) / 2 if len(middle) > 1 else sum(middle)


class SplitWriter:
    """Takes the samples of one split as they are made, and makes its file of them.

    Args:
        path: of the file to be; what comes before lies beside it.
    """

    PARTS = {"offsets": torch.int64, "tokens": torch.int32, "supervised": torch.uint8}  # the order in the file

    def __init__(self, path: Path) -> None:
        self.path, self.audit = path, Audit()
        self.paths = {name: path.with_suffix(f".{name}") for name in self.PARTS}
        self.files = {name: open(part, "wb") for name, part in self.paths.items()}  # noqa: SIM115
        self.first: tuple[list[int], list[bool]] | None = None
        self.rows = self.tokens = 0
        self.files["offsets"].write(bytes(8))

    def append(self, ids: list[int], supervised: list[bool], times: int = 1) -> None:
        """Add a sample, `times` times over."""
        self.first = self.first or (ids, supervised)
        self.files["tokens"].write(np.asarray(ids, np.int32).tobytes() * times)
        self.files["supervised"].write(bytes(supervised) * times)
        for _ in range(times):
            self.rows, self.tokens = self.rows + 1, self.tokens + len(ids)
            self.files["offsets"].write(self.tokens.to_bytes(8, "little"))
        self.audit.lengths[len(ids)] += times
        self.audit.supervised += sum(supervised[1:]) * times

    def finish(self, seed: int | None = None) -> None:
        """Write the file, whole or not at all; with `seed` the samples in a random order."""
        for file in self.files.values():
            file.close()
        sizes = {"offsets": self.rows + 1, "tokens": self.tokens, "supervised": self.tokens}
        layout = {name: torch.empty(sizes[name], dtype=dtype, device="meta") for name, dtype in self.PARTS.items()}
        contents = {name: blocks(path) for name, path in self.paths.items()}
        if seed is not None and self.tokens:
            contents = self.shuffled(
                torch.randperm(self.rows, generator=torch.Generator().manual_seed(seed % 2**63)).tolist()
            )
        save_safetensors_streamed(self.path, layout, contents)
        for path in self.paths.values():
            path.unlink()

    def shuffled(self, order: list[int]) -> dict[str, Iterable[bytes]]:
        offsets = np.fromfile(self.paths["offsets"], np.int64)
        spans = [slice(offsets[i], offsets[i + 1]) for i in order]
        tokens = np.memmap(self.paths["tokens"], np.int32, "r")
        supervised = np.memmap(self.paths["supervised"], np.uint8, "r")
        moved = np.concatenate(([0], np.diff(offsets)[order].cumsum()))
        return {
            "offsets": [moved.astype(np.int64).tobytes()],
            "tokens": (tokens[span].tobytes() for span in spans),
            "supervised": (supervised[span].tobytes() for span in spans),
        }


def blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from iter(partial(file.read, 1 << 20), b"")


def write_meta(
    folder: Path, splits: dict[str, SplitWriter], tokenizer: Tokenizer, style: PromptStyle, **record: Any
) -> None:
    """Write the data.json of a folder that holds the splits' files."""
    meta = {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer.fingerprint,
        "prompt_style": style.to_dict(),
        "audit": {name: split.audit.summary() for name, split in splits.items()},
        **record,
    }
    (folder / "data.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Sample:
    tokens: Tensor  # int32 (T,)
    supervised: Tensor  # uint8 (T,)


class Dataset(Sequence[Sample]):
    """One split of a data folder, mapped from disk.

    Raises:
        UserError: the folder is missing, damaged or empty.
    """

    def __init__(self, data_dir: Path, split: str) -> None:
        path = Path(data_dir) / f"{split}.safetensors"
        try:
            file = safe_open(path, framework="pt")
            self.tokens, self.supervised = file.get_tensor("tokens"), file.get_tensor("supervised")
            self.offsets = file.get_tensor("offsets")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not readable as prepared data ({error}); prepare it again") from None
        self.lengths: list[int] = self.offsets.diff().tolist()
        contents = b"".join(hashlib.sha256(t.numpy()).digest() for t in (self.tokens, self.supervised, self.offsets))
        self.fingerprint = hashlib.sha256(contents).hexdigest()[:16]
        if not self.lengths:
            raise UserError(f"{path}: holds no samples; prepare data with at least one row in each split")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Sample:
        span = slice(self.offsets[i], self.offsets[i + 1])
        return Sample(self.tokens[span], self.supervised[span])


def read_meta(data_dir: Path, tokenizer: Tokenizer, flag: str = "--data_dir") -> dict[str, Any]:
    """The contents of data.json.

    Args:
        flag: by which the folder was given.

    Raises:
        UserError: not a data folder, or one prepared with another tokenizer or by another format version.
    """
    path = Path(data_dir) / "data.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"{flag} {data_dir}: not a folder of prepared data; make one with scripts/prepare_alpaca.py or "
            "scripts/prepare_json.py"
        ) from None
    if meta.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {meta.get('format_version')}, expected {FORMAT_VERSION}; prepare again"
        )
    if meta["tokenizer"] != tokenizer.fingerprint:
        raise UserError(
            f"{flag} {data_dir}: prepared with another tokenizer than that of {tokenizer.checkpoint_dir}; "
            "prepare it again with this --checkpoint_dir"
        )
    return meta


@dataclass(frozen=True)
class PackedRow:
    """Samples one after another in a row, without padding. Each predicts its own next tokens."""

    idx: Tensor  # int64 (1, T)
    segments: Segments
    targets: Targets

    def to(self, device: torch.device) -> "PackedRow":
        if device.type == "cpu":
            return self
        s, t = self.segments, self.targets
        idx, offsets, positions, at, labels = (
            x.pin_memory().to(device, non_blocking=True)
            for x in (self.idx, s.offsets, s.positions, t.positions, t.labels)
        )
        return PackedRow(idx, Segments(s.lengths, offsets, positions), Targets(at, labels))


def pack(samples: Iterable[Sample]) -> PackedRow:
    """One row of all samples. The last token of each is predicted but predicts nothing, so it is not fed."""
    samples = list(samples)
    idx = torch.cat([s.tokens[:-1] for s in samples]).long()
    labels = torch.cat([s.tokens[1:] for s in samples]).long()
    at = torch.cat([s.supervised[1:] for s in samples]).nonzero().squeeze(1)
    segments = Segments.of([len(s.tokens) - 1 for s in samples])
    return PackedRow(idx.unsqueeze(0), segments, Targets(at, labels[at]))


def supervised_count(samples: Iterable[Sample]) -> int:
    """Tokens that a loss over these samples is the mean of."""
    return sum(int(s.supervised[1:].sum()) for s in samples)


@lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n samples in an epoch; the same for any number of devices."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(n, generator=generator).tolist()


def step_samples(n: int, batch_size: int, seed: int, step: int, total: int) -> list[int]:
    """The samples of optimizer step `step` (from 0), of n. Epochs follow each other without a gap, up to `total`."""
    positions = range(step * batch_size, min((step + 1) * batch_size, total))
    return [epoch_order(n, seed, p // n)[p % n] for p in positions]


def micro_batches(indices: list[int], lengths: Sequence[int], size: int | None, tokens: int) -> Iterator[list[int]]:
    """Split one step's samples into packed rows: of `size` samples, or if that is None of up to `tokens` tokens."""
    row: list[int] = []
    for i in indices:
        full = len(row) == size if size else row and sum(lengths[j] for j in row) + lengths[i] > tokens
        if full:
            yield row
            row = []
        row.append(i)
    if row:
        yield row
