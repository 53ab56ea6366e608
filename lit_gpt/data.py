"""Prepared data: rows tokenized once, kept on disk, mapped, and packed into the rows of training.

A data folder holds `train.safetensors` and `validation.safetensors`, each with

    tokens      int32 (total,)   the samples one after another
    offsets     int64 (n + 1,)   where each begins
    supervised  uint8 (total,)   1 where the token is to be learnt

and `data.json`: the audit, the prompt style and the tokenizer's fingerprint, which is checked when the data is used.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_gpt.checkpoint import new_folder, save_safetensors
from lit_gpt.errors import UserError
from lit_gpt.model import Segments, Targets
from lit_gpt.prompts import Message, PromptStyle
from lit_gpt.tokenizer import Tokenizer

FORMAT_VERSION = 1
SPLITS = ("train", "validation")


@dataclass
class Audit:
    """What became of the rows: nothing is dropped or cut without being counted here."""

    dropped: dict[str, int] = field(default_factory=dict)  # reason: rows
    lengths: list[int] = field(default_factory=list)  # tokens of each kept row
    supervised: int = 0  # tokens
    truncated: int = 0  # rows cut to max_seq_length
    lost_end: int = 0  # rows whose answer lost its end token, or never had one
    displaced: int = 0  # answers that do not follow the tokens which generation would see before them
    unsupervised: int = 0  # rows in which no token is supervised

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def summary(self) -> dict[str, Any]:
        lengths = self.lengths
        return {
            "rows_kept": len(lengths),
            "rows_dropped": self.dropped,
            "tokens": sum(lengths),
            "tokens_supervised": self.supervised,
            "length_mean": round(mean(lengths), 1) if lengths else 0,
            "length_median": median(lengths) if lengths else 0,
            "length_max": max(lengths, default=0),
            "rows_truncated": self.truncated,
            "rows_without_end_token": self.lost_end,
            "answers_after_another_prompt": self.displaced,
            "rows_without_supervised_token": self.unsupervised,
        }


@dataclass
class Split:
    """The samples of one split while they are being prepared."""

    tokens: list[Tensor] = field(default_factory=list)
    supervised: list[Tensor] = field(default_factory=list)
    audit: Audit = field(default_factory=Audit)

    def save(self, path: Path) -> None:
        counts = torch.tensor([0, *(len(t) for t in self.tokens)], dtype=torch.int64)
        empty = [torch.empty(0, dtype=torch.int32)]
        tensors = {
            "tokens": torch.cat(self.tokens or empty),
            "supervised": torch.cat(self.supervised or empty).to(torch.uint8),
            "offsets": counts.cumsum(0),
        }
        save_safetensors(path, tensors)


def add_sample(
    split: Split,
    messages: list[Message],
    tokenizer: Tokenizer,
    style: PromptStyle,
    max_seq_length: int,
    mask_inputs: bool,
    allow_unsupervised: bool,
) -> None:
    """Tokenize one row into the split, cut to `max_seq_length` tokens, and enter what happened in the audit."""
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        return split.audit.drop("empty answer")
    ids, answers = style.encode_sample(messages, tokenizer)
    audit = split.audit
    audit.truncated += len(ids) > max_seq_length
    audit.displaced += sum(answer.displaced for answer in answers)
    supervised = [not mask_inputs] * len(ids)
    for answer in answers:
        supervised[answer.start : answer.stop] = [True] * (answer.stop - answer.start)
    ids, supervised = ids[:max_seq_length], supervised[:max_seq_length]
    if not any(supervised[1:]):  # the first token has nothing to be predicted from
        audit.unsupervised += 1
        return audit.drop("no supervised token") if allow_unsupervised else None
    ends = [answer.stop - 1 for answer in answers if answer.start < answer.stop]
    audit.lost_end += not ends or ends[-1] >= len(ids) or ids[ends[-1]] not in style.stop_ids
    audit.lengths.append(len(ids))
    audit.supervised += sum(supervised[1:])
    split.tokens.append(torch.tensor(ids, dtype=torch.int32))
    split.supervised.append(torch.tensor(supervised, dtype=torch.uint8))
    return None


def write(destination: Path, splits: dict[str, Split], tokenizer: Tokenizer, style: PromptStyle, **record: Any) -> None:
    """Write the data folder, whole or not at all."""
    meta = {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer.fingerprint,
        "prompt_style": style.to_dict(),
        "audit": {name: split.audit.summary() for name, split in splits.items()},
        **record,
    }
    with new_folder(destination) as folder:
        for name, split in splits.items():
            split.save(folder / f"{name}.safetensors")
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


def read_meta(data_dir: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """The contents of data.json.

    Raises:
        UserError: not a data folder, or one prepared with another tokenizer or by another format version.
    """
    path = Path(data_dir) / "data.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"--data_dir {data_dir}: not a folder of prepared data; make one with scripts/prepare_alpaca.py or "
            "scripts/prepare_json.py"
        ) from None
    if meta.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {meta.get('format_version')}, expected {FORMAT_VERSION}; prepare again"
        )
    if meta["tokenizer"] != tokenizer.fingerprint:
        raise UserError(
            f"--data_dir {data_dir}: prepared with another tokenizer than that of {tokenizer.checkpoint_dir}; "
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
