"""Writes and reads prepared data: rows tokenized once, kept on disk and mapped.

A data folder holds `train.safetensors` and `validation.safetensors`, each with

    tokens      int32 (total,)   the samples one after another
    offsets     int64 (n + 1,)   where each begins
    supervised  uint8 (total,)   1 where the token is to be learned

and `data.json`: the audit, the prompt style and the tokenizer's fingerprint, which is checked when the data is used.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_gpt.data.audit import Audit
from lit_gpt.data.folder import FORMAT_VERSION, read_record
from lit_gpt.errors import UsageError, UserError
from lit_gpt.files import write_json
from lit_gpt.text.prompt_style import DamagedStyle, PromptStyle
from lit_gpt.text.tokenizer import Tokenizer


def write_meta(folder: Path, audits: dict[str, Audit], tokenizer: Tokenizer, style: PromptStyle, **record: Any) -> None:
    """Write the data.json of a folder that holds the splits' files."""
    meta = {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer.fingerprint,
        "prompt_style": style.to_dict(),
        "audit": {name: audit.summary() for name, audit in audits.items()},
        **record,
    }
    write_json(folder / "data.json", meta)


class Samples(Protocol):
    """Says what prepared samples have, of whatever kind an objective takes.

    Attributes:
        tokens: the ids of all samples.
        lengths: how many tokens each sample has.
        fingerprint: which no other samples have.
    """

    tokens: Tensor
    lengths: list[int]
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Any: ...


@dataclass(frozen=True)
class Sample:
    """Holds the tokens of a sample, and which of them are to be learned."""

    tokens: Tensor  # int32 (T,)
    supervised: Tensor  # uint8 (T,)
    number: int | None = None  # which of the data's it is; what is random about it in training goes by that


class Dataset:
    """Maps one split of a data folder from disk.

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
        self.lengths = self.offsets.diff().tolist()
        contents = b"".join(hashlib.sha256(t.numpy()).digest() for t in (self.tokens, self.supervised, self.offsets))
        self.fingerprint = hashlib.sha256(contents).hexdigest()[:16]
        if not self.lengths:
            raise UserError(f"{path}: holds no samples; prepare data with at least one row in each split")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Sample:
        span = slice(self.offsets[i], self.offsets[i + 1])
        return Sample(self.tokens[span], self.supervised[span], i)


class Prefixed:
    """Samples that begin with the same tokens, of which none is learned."""

    def __init__(self, samples: Samples, ids: Sequence[int]) -> None:
        self.samples, self.ids, self.tokens, self.fingerprint = samples, ids, samples.tokens, samples.fingerprint
        self.lengths = [length + len(ids) for length in samples.lengths]
        if not isinstance(samples[0], Sample):
            raise UsageError("virtual tokens need samples of one text each; train for another objective, or by LoRA")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Sample:
        return with_tokens_before(self.samples[i], self.ids)


def prefixed(samples: Samples, ids: Sequence[int]) -> Samples:
    """Return samples with these tokens before each, or as they are if there are none."""
    return Prefixed(samples, ids) if ids else samples


def with_tokens_before(sample: Sample, ids: Sequence[int]) -> Sample:
    """Return a sample with tokens before it. What was its first one is not learned, as without them."""
    supervised = torch.cat((torch.zeros(len(ids), dtype=torch.uint8), sample.supervised))
    supervised[len(ids)] = 0
    return Sample(torch.cat((torch.tensor(ids, dtype=torch.int32), sample.tokens)), supervised, sample.number)


def read_meta(data_dir: Path, tokenizer: Tokenizer, flag: str = "--data_dir") -> dict[str, Any]:
    """Return the contents of data.json.

    Args:
        flag: the one by which the folder was given.

    Raises:
        UserError: not a data folder, or one prepared with another tokenizer or by another format version.
    """
    meta = read_record(data_dir, flag)
    try:
        PromptStyle.from_dict(meta["prompt_style"])
    except (KeyError, DamagedStyle) as error:
        raise UserError(f"{Path(data_dir) / 'data.json'}: {error}; prepare the data again") from None
    if meta["tokenizer"] != tokenizer.fingerprint:
        raise UserError(
            f"{flag} {data_dir}: prepared with another tokenizer than that of {tokenizer.checkpoint_dir}; "
            "prepare it again with this --checkpoint_dir"
        )
    return meta
