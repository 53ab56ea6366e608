"""What the prepare scripts share: reading rows, turning them into messages, splitting, and reporting the audit."""

import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tqdm import tqdm

from lit_gpt import data
from lit_gpt.checkpoint import check_checkpoint_dir, check_new
from lit_gpt.config import Config
from lit_gpt.errors import UserError
from lit_gpt.hf_files import read_json
from lit_gpt.prompts import Message, PromptStyle, instruction_messages
from lit_gpt.tokenizer import Tokenizer

Row = tuple[str, dict[str, Any]]  # where it stands, for errors, and its fields


def read_rows(path: Path) -> list[Row]:
    """The rows of a .json (a list of objects), .jsonl or .csv file.

    Raises:
        UserError: the file is missing, empty or malformed; names the line.
    """
    readers = {".json": json_rows, ".jsonl": jsonl_rows, ".csv": csv_rows}
    if path.suffix not in readers:
        raise UserError(f"{path}: expected a file that ends in .json, .jsonl or .csv")
    try:
        rows = list(readers[path.suffix](path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not rows:
        raise UserError(f"{path}: holds no rows")
    return rows


def source_file(repo_id: str, name: str) -> Path:
    """A file of a data set on the hub, downloaded once into the hub's cache.

    Raises:
        UserError: it cannot be had.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, name, repo_type="dataset"))
    except Exception as error:  # whatever the network does
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{repo_id}: {name} could not be downloaded ({reason}); give a local copy by --json_path"
        ) from None


def json_rows(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of objects (one object a line belongs into a .jsonl file)")
    for i, row in enumerate(rows):
        yield check_row(f"{path}: row {i + 1}", row)


def jsonl_rows(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: line {number}: not JSON: {error.msg}") from None
            yield check_row(f"{path}: line {number}", row)


def csv_rows(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        csv.field_size_limit(2**31 - 1)
        reader = csv.DictReader(file)
        for row in reader:
            where = f"{path}: line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{where}: expected {len(reader.fieldnames)} columns as in the first line")
            yield where, row


def check_row(where: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, found {type(row).__name__}")
    return where, row


def to_messages(where: str, row: dict[str, Any], hp: SimpleNamespace) -> list[Message]:
    """The messages of a row: those of its messages column, or made of its instruction, input and output columns.

    Raises:
        UserError: a column is missing or holds no text.
    """
    if hp.messages_column in row:
        return check_messages(where, row[hp.messages_column])
    fields = []
    for column, needed in ((hp.instruction_column, True), (hp.input_column, False), (hp.output_column, True)):
        value = row.get(column)
        if value is None and needed:
            found = ", ".join(map(str, row)) or "nothing"
            raise UserError(
                f"{where}: the field '{column}' is missing (found: {found}); name yours with --*_column flags"
            )
        if not isinstance(value or "", str):
            raise UserError(f"{where}: the field '{column}' is {type(value).__name__}, expected text")
        fields.append(value or "")
    return check_text(where, instruction_messages(*fields))


def check_messages(where: str, messages: Any) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: expected a list of messages")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UserError(f'{where}: expected each message as {{"role": text, "content": text}}')
    return check_text(where, messages)


def check_text(where: str, messages: list[Message]) -> list[Message]:
    for message in messages:
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:  # JSON can spell half of an emoji
            raise UserError(f"{where}: holds text that is not Unicode ({error.reason})") from None
    return messages


def prepare(hp: SimpleNamespace, rows: list[Row], validation_rows: list[Row] | None = None) -> None:
    """Tokenize the rows, print the audit and write the data folder.

    Args:
        hp: checkpoint_dir, destination_path, prompt_style, max_seq_length, mask_inputs, allow_unsupervised,
            validation_fraction, seed and the names of the columns.
        validation_rows: None: split off `validation_fraction` of the rows, chosen by `seed`.

    Raises:
        UserError: unusable rows, or rows without a supervised token. Nothing is written then.
    """
    check_checkpoint_dir(hp.checkpoint_dir, converted=False)
    check_new(hp.destination_path)
    tokenizer = Tokenizer(hp.checkpoint_dir)
    style = PromptStyle.from_name(hp.prompt_style, tokenizer)
    block_size = Config.from_hf(read_json(hp.checkpoint_dir / "config.json")).block_size
    limit = min(hp.max_seq_length or block_size, block_size)
    # all rows are looked at in the file's order first, so that an error names the first bad one
    parts = [[to_messages(where, row, hp) for where, row in part] for part in (rows, validation_rows or ())]
    if validation_rows is None:
        parts = split(parts[0], hp.validation_fraction, hp.seed)
    splits = {}
    for name, part in zip(data.SPLITS, parts, strict=True):
        splits[name] = data.Split()
        for messages in tqdm(part, desc=name, unit="row", disable=None):
            data.add_sample(splits[name], messages, tokenizer, style, limit, hp.mask_inputs, hp.allow_unsupervised)
    report(splits, tokenizer, style, limit)
    refuse_unusable(splits, hp)
    record = {"max_seq_length": limit, "mask_inputs": hp.mask_inputs, "seed": hp.seed}
    data.write(hp.destination_path, splits, tokenizer, style, **record)
    print(
        f"\nwrote {hp.destination_path}; next: python finetune/lora.py --checkpoint_dir {hp.checkpoint_dir} "
        f"--data_dir {hp.destination_path}"
    )


def split(samples: list[list[Message]], fraction: float, seed: int) -> tuple[list, list]:
    """The samples in a random order, those to train on and those to validate on."""
    shuffled = random.Random(seed).sample(samples, len(samples))
    held_out = max(1, round(fraction * len(samples)))
    if held_out >= len(samples):
        raise UserError(f"--validation_fraction {fraction}: leaves none of the {len(samples)} rows to train on")
    return shuffled[held_out:], shuffled[:held_out]


def refuse_unusable(splits: dict[str, data.Split], hp: SimpleNamespace) -> None:
    unsupervised = sum(split.audit.unsupervised for split in splits.values())
    if unsupervised and not hp.allow_unsupervised:
        raise UserError(
            f"{unsupervised} rows have no supervised token within --max_seq_length: raise it, or drop these rows with "
            "--allow_unsupervised true; nothing was written"
        )
    for name, split in splits.items():
        if not split.tokens:
            raise UserError(f"no usable row is left for {name}; nothing was written")


def report(splits: dict[str, data.Split], tokenizer: Tokenizer, style: PromptStyle, limit: int) -> None:
    """Print the supervision audit and one sample with its supervised part marked."""
    summaries = {name: split.audit.summary() for name, split in splits.items()}
    print(f"{'':32}" + "".join(f"{name:>12}" for name in summaries))
    for key in next(iter(summaries.values())):
        if key != "rows_dropped":
            print(f"{key.replace('_', ' '):32}" + "".join(f"{summary[key]:>12}" for summary in summaries.values()))
    for reason in sorted({reason for split in splits.values() for reason in split.audit.dropped}):
        counts = (split.audit.dropped.get(reason, 0) for split in splits.values())
        print(f"{'rows dropped: ' + reason:32}" + "".join(f"{count:>12}" for count in counts))
    print(f"\nprompt style {style.name}, at most {limit} tokens a row. The first row, its supervised part in ⟦ ⟧:\n")
    if splits["train"].tokens:
        print(marked(splits["train"].tokens[0].tolist(), splits["train"].supervised[0].tolist(), tokenizer))


def marked(ids: list[int], supervised: list[int], tokenizer: Tokenizer) -> str:
    parts, start = [], 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or supervised[i] != supervised[start]:
            text = tokenizer.decode(ids[start:i], skip_special_tokens=False)
            parts.append(f"⟦{text}⟧" if supervised[start] else text)
            start = i
    return "".join(parts)
