"""Writes and reads prepared data: rows tokenized once, kept on disk and mapped.

A data folder holds `train.safetensors` and `validation.safetensors`, each with

    tokens      int32 (total,)   the samples one after another
    offsets     int64 (n + 1,)   where each begins
    supervised  uint8 (total,)   1 where the token is to be learned

and `data.json`: the audit, the prompt style and the tokenizer's fingerprint, which is checked when the data is used.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_gpt.data.audit import Audit
from lit_gpt.data.folder import FORMAT_VERSION, read_record
from lit_gpt.errors import UserError
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
        return Sample(self.tokens[span], self.supervised[span])


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
