"""What the prepare scripts share: rows to messages, messages to tokens, tokens to the data folder, with an audit.

The rows are read twice: once to check and count all of them, so that those to validate on can be drawn, and once to
tokenize them. Neither holds more than a few at a time.
"""

import json
from array import array
from collections.abc import Iterator
from contextlib import suppress
from hashlib import blake2b
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lit_gpt import data, supervision
from lit_gpt.checkpoint import check_checkpoint_dir, check_new, new_folder
from lit_gpt.config import Config
from lit_gpt.errors import UserError
from lit_gpt.hf_files import read_json
from lit_gpt.prompts import Message, PromptStyle, Tools, instruction_messages
from lit_gpt.rows import Row, Source, parse_sources
from lit_gpt.supervision import Encoded, Rendered
from lit_gpt.tokenizer import Tokenizer

BATCH_ROWS, BATCH_CHARACTERS = 256, 1 << 20  # what is tokenized at once
ROLES = {"human": "user", "gpt": "assistant", "function": "tool"}  # as ShareGPT has them
VALIDATION = -1  # in place of how often a row is taken


class BadRow(UserError):
    """A row that cannot be used."""


class Conversation(NamedTuple):
    where: str  # file and line
    messages: list[Message]
    tools: Tools


def source_file(repo_id: str, name: str) -> str:
    """A file of a data set on the hub, downloaded once into the hub's cache.

    Raises:
        UserError: it cannot be had.
    """
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repo_id, name, repo_type="dataset")
    except Exception as error:  # whatever the network does
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{repo_id}: {name} could not be downloaded ({reason}); give a local copy by --json_path"
        ) from None


def to_conversation(row: Row, hp: SimpleNamespace) -> Conversation:
    """The messages of a row: those of its messages column, or made of its instruction, input and output columns.

    Raises:
        BadRow: a column is missing or holds something else.
    """
    if row.problem:
        raise BadRow(f"{row.where}: {row.problem}")
    try:
        if row.fields.get(hp.messages_column) is not None:
            found = read_messages(row.fields[hp.messages_column]), read_tools(row.fields.get("tools"))
        else:
            found = instruction_messages(*(text_of(row.fields, column, hp) for column in COLUMNS)), None
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # JSON can spell half of an emoji
        raise BadRow(f"{row.where}: holds text that is not Unicode ({error.reason})") from None
    except (TypeError, ValueError) as error:
        raise BadRow(f"{row.where}: {error}") from None
    return Conversation(row.where, *found)


COLUMNS = {"instruction_column": True, "input_column": False, "output_column": True}  # whether a row must have it


def text_of(fields: dict[str, Any], flag: str, hp: SimpleNamespace) -> str:
    column = getattr(hp, flag)
    value = fields.get(column)
    if value is None and COLUMNS[flag]:
        found = ", ".join(map(str, fields)) or "nothing"
        raise ValueError(f"the field '{column}' is missing (found: {found}); name yours with --*_column flags")
    if not isinstance(value or "", str):
        raise ValueError(f"the field '{column}' is {type(value).__name__}, expected text")
    return value or ""


def read_messages(messages: Any) -> list[Message]:
    """Messages as `{"role", "content"}`, from a list of them or from one spelled in JSON.

    Raises:
        ValueError: it is none.
    """
    messages = json.loads(messages) if isinstance(messages, str) else messages
    if not isinstance(messages, list) or not messages:
        raise ValueError("expected a list of messages")
    return [read_message(message) for message in messages]


def read_message(message: Any) -> Message:
    message = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
    if "role" not in message and isinstance(message.get("from"), str):
        role = message.pop("from")
        message = {"role": ROLES.get(role, role), "content": message.pop("value", None), **message}
    calls = message.get("tool_calls", [])
    named = isinstance(calls, list) and all(
        isinstance(call, dict) and isinstance(call.get("function", call), dict)
        and isinstance(call.get("function", call).get("name"), str)
        for call in calls
    )  # fmt: skip
    if not named:
        raise ValueError('expected tool_calls as a list of {"function": {"name": text, "arguments": object}}')
    content = message.get("content", "" if calls else None)
    if not isinstance(message.get("role"), str) or not isinstance(content, str):
        raise ValueError('expected each message as {"role": text, "content": text}')
    if not isinstance(message.get("train", True), bool) or message.get("weight", 1) not in (0, 1):
        raise ValueError("expected a message's train as true or false, its weight as 0 or 1")
    return message


def read_tools(tools: Any) -> Tools:
    tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("expected tools as a list of JSON schemas")
    return tools


def prepare(hp: SimpleNamespace, rows: str, validation_rows: str | None = None) -> None:
    """Tokenize the rows, print the audit and write the data folder.

    Args:
        hp: checkpoint_dir, destination_path, prompt_style, max_seq_length, mask_inputs, allow_unsupervised,
            skip_bad_rows, deduplicate, validation_fraction, seed and the names of the columns.
        rows: sources, as `rows.parse_sources` reads them.
        validation_rows: the same; None: split off `validation_fraction` of the rows, chosen by `seed`.

    Raises:
        UserError: unusable rows, or rows without a supervised token. Nothing is written then.
    """
    check_checkpoint_dir(hp.checkpoint_dir, converted=False)
    check_new(hp.destination_path)
    tokenizer = Tokenizer(hp.checkpoint_dir)
    style = PromptStyle.from_name(hp.prompt_style, tokenizer)
    block_size = Config.from_hf(read_json(hp.checkpoint_dir / "config.json")).block_size
    limit = min(hp.max_seq_length or block_size, block_size)
    sources, apart = parse_sources(rows), parse_sources(validation_rows) if validation_rows else []
    if any(source.weight != 1 for source in apart):
        raise UserError("--validation_path: rows to validate on are taken once; leave the weight out")
    counts = survey([*sources, *apart], hp)
    times = draw(sources, counts[: len(sources)], None if apart else hp.validation_fraction, hp.seed)
    times = torch.cat((times, torch.full((sum(counts) - len(times),), VALIDATION, dtype=torch.int8)))
    with new_folder(hp.destination_path) as folder:
        splits = {name: data.SplitWriter(folder / f"{name}.safetensors") for name in data.SPLITS}
        tokenization = Tokenization(hp, tokenizer, style, limit, rows=len(times))
        found = conversations([*sources, *apart], counts, hp)
        bar = tqdm(found, desc="tokenizing", unit=" rows", total=len(times), disable=None)
        for conversation, n in zip(bar, times.tolist(), strict=True):
            if n:
                tokenization.add(conversation, splits["validation" if n == VALIDATION else "train"], abs(n))
        tokenization.flush()
        report(splits, tokenizer, style, limit)
        refuse_unusable(splits, hp)
        splits["train"].finish()
        splits["validation"].finish(seed=None if apart else hp.seed)
        record = {"max_seq_length": limit, "mask_inputs": hp.mask_inputs, "seed": hp.seed}
        record["sources"] = [vars(source) | {"rows": n} for source, n in zip([*sources, *apart], counts, strict=True)]
        data.write_meta(folder, splits, tokenizer, style, **record)
    print(
        f"\nwrote {hp.destination_path}; next: python finetune/lora.py --checkpoint_dir {hp.checkpoint_dir} "
        f"--data_dir {hp.destination_path}"
    )


def survey(sources: list[Source], hp: SimpleNamespace) -> list[int]:
    """Look at all rows; returns how many of each source can be used.

    Raises:
        UserError: names the first row that cannot be used and counts the others, unless `skip_bad_rows`.
    """
    counts, first, bad = [], "", 0
    for source in sources:
        rows = good = 0
        for row in tqdm(source.rows(), desc=f"checking {source.name}", unit=" rows", disable=None):
            rows += 1
            try:
                to_conversation(row, hp)
                good += 1
            except BadRow as error:
                first = first or str(error)
        if not rows:
            raise UserError(f"{source.name}: holds no rows")
        counts.append(good)
        bad += rows - good
    if bad and not hp.skip_bad_rows:
        more = f"; {bad - 1} more rows cannot be used either" if bad > 1 else ""
        raise UserError(first + more)
    if bad:
        print(f"{bad} rows cannot be used and are left out, the first: {first}")
    return counts


def draw(sources: list[Source], counts: list[int], fraction: float | None, seed: int) -> Tensor:
    """How often each row is taken, int8 (rows,): by its source's weight, or VALIDATION for a random `fraction`.

    Raises:
        UserError: no row is left to train on.
    """
    generator, times = torch.Generator().manual_seed(seed % 2**63), []
    for source, n in zip(sources, counts, strict=True):
        whole = int(source.weight)
        once_more = torch.randperm(n, generator=generator)[: round((source.weight - whole) * n)]
        times.append(torch.full((n,), whole, dtype=torch.int8).index_fill(0, once_more, whole + 1))
    drawn = torch.cat(times)
    if fraction is None:
        return drawn
    taken = drawn.nonzero().squeeze(1)
    if not len(taken):
        raise UserError(f"{', '.join(f'{s.name}={s.weight:g}' for s in sources)}: such weights take none of the rows")
    held_out = max(1, round(fraction * len(taken)))
    if held_out >= len(taken):
        raise UserError(f"--validation_fraction {fraction}: leaves none of the {len(taken)} rows to train on")
    drawn[taken[torch.randperm(len(taken), generator=generator)[:held_out]]] = VALIDATION
    return drawn


class Tokenization:
    """Makes samples of conversations, several at once, and hands them to the splits."""

    def __init__(self, hp: SimpleNamespace, tokenizer: Tokenizer, style: PromptStyle, limit: int, rows: int) -> None:
        self.hp, self.tokenizer, self.style, self.limit = hp, tokenizer, style, limit
        self.seen = Seen(rows) if hp.deduplicate else None
        self.batch: list[tuple[Conversation, Rendered, data.SplitWriter, int]] = []
        self.characters = 0

    def add(self, conversation: Conversation, split: data.SplitWriter, times: int = 1) -> None:
        """Render a row, and tokenize those that wait once they are enough.

        Raises:
            BadRow: the template refuses it, unless `skip_bad_rows`.
        """
        where, messages, tools = conversation
        theirs = [message for message in messages if message["role"] == "assistant"]
        if not any(message.get("content", "").strip() or message.get("tool_calls") for message in theirs):
            return split.audit.drop("empty answer", times)
        try:
            rendered = self.style.render_sample(messages, self.tokenizer, tools)
        except UserError as error:
            if not self.hp.skip_bad_rows:
                raise BadRow(f"{where}: {error}") from None
            return split.audit.drop("refused by the template", times)
        self.batch.append((conversation, rendered, split, times))
        self.characters += len(rendered.text)
        if len(self.batch) == BATCH_ROWS or self.characters > BATCH_CHARACTERS:
            self.flush()
        return None

    def flush(self) -> None:
        encodings = self.style.encode([rendered.text for _, rendered, _, _ in self.batch], self.tokenizer)
        for (conversation, rendered, split, times), encoding in zip(self.batch, encodings, strict=True):
            encoded = supervision.encode(rendered, encoding, self.tokenizer, self.style.stop_ids)
            sample = self.cut(encoded, split.audit, conversation.where, times)
            if sample and self.seen and not self.seen.add(array("i", sample[0]).tobytes() + bytes(sample[1])):
                split.audit.drop("duplicate", times)
            elif sample:
                split.append(*sample, times)
        self.batch, self.characters = [], 0

    def cut(self, encoded: Encoded, audit: data.Audit, where: str, times: int) -> tuple[list[int], list[bool]] | None:
        """A row's ids and what of them is supervised, cut to the limit; None if that is nothing. What happened enters
        the audit."""
        audit.truncated += times * (len(encoded.ids) > self.limit)
        audit.displaced += times * sum(answer.displaced for answer in encoded.answers)
        audit.rewritten += times * encoded.rewritten
        audit.left_out += times * encoded.left_out
        supervised = encoded.learnt
        if not self.hp.mask_inputs:
            untaught = {i for answer in encoded.answers if not answer.train for i in range(answer.start, answer.stop)}
            supervised = [i not in untaught for i in range(len(encoded.ids))]
        ids, supervised = encoded.ids[: self.limit], supervised[: self.limit]
        if not any(supervised[1:]):  # the first token has nothing to be predicted from
            audit.unsupervised += times
            audit.first_unsupervised = audit.first_unsupervised or where
            return audit.drop("no supervised token", times) if self.hp.allow_unsupervised else None
        ends = [answer.stop - 1 for answer in encoded.answers if answer.start < answer.stop]
        lost = not ends or ends[-1] >= len(ids) or ids[ends[-1]] not in self.style.stop_ids
        audit.lost_end += times * lost
        return ids, supervised


class Seen:
    """What has been seen, by hashes of 64 bits in one array, at 11 bytes for each that there is room for. Among ten
    million samples, the chance that two different ones share a hash is three in a million."""

    def __init__(self, room: int) -> None:
        self.slots = array("Q", bytes(8)) * (room * 7 // 5 + 1)

    def add(self, sample: bytes) -> bool:
        """Whether it is new."""
        digest = int.from_bytes(blake2b(sample, digest_size=8).digest()) or 1
        i = digest % len(self.slots)
        while self.slots[i] not in (0, digest):
            i = (i + 1) % len(self.slots)
        new = not self.slots[i]
        self.slots[i] = digest
        return new


def conversations(sources: list[Source], counts: list[int], hp: SimpleNamespace) -> Iterator[Conversation]:
    """The rows that can be used, those that `survey` has counted.

    Raises:
        UserError: there are now more or fewer.
    """
    for source, expected in zip(sources, counts, strict=True):
        count = 0
        for row in source.rows():
            with suppress(BadRow):
                conversation = to_conversation(row, hp)
                count += 1
                if count > expected:
                    break
                yield conversation
        if count != expected:
            raise UserError(
                f"{source.name}: changed while it was prepared, it no longer has {expected} usable rows; prepare it "
                "again when nothing writes to it; nothing was written"
            )


def refuse_unusable(splits: dict[str, data.SplitWriter], hp: SimpleNamespace) -> None:
    unsupervised = sum(split.audit.unsupervised for split in splits.values())
    if unsupervised and not hp.allow_unsupervised:
        rewritten = sum(split.audit.rewritten for split in splits.values())
        hint = (
            f" (of {rewritten} answers the template leaves something out, and they are not learnt)" if rewritten else ""
        )
        first = next(split.audit.first_unsupervised for split in splits.values() if split.audit.unsupervised)
        raise UserError(
            f"{unsupervised} rows have no supervised token within --max_seq_length, the first is {first}: raise it, or "
            f"drop these rows with --allow_unsupervised true{hint}; nothing was written"
        )
    for name, split in splits.items():
        if not split.rows:
            raise UserError(f"no usable row is left for {name}; nothing was written")


def report(splits: dict[str, data.SplitWriter], tokenizer: Tokenizer, style: PromptStyle, limit: int) -> None:
    """Print the supervision audit and one sample with its supervised part marked."""
    summaries = {name: split.audit.summary() for name, split in splits.items()}
    print(f"{'':32}" + "".join(f"{name:>12}" for name in summaries))
    for key in next(iter(summaries.values())):
        if key != "rows_dropped":
            print(f"{key.replace('_', ' '):32}" + "".join(f"{summary[key]:>12}" for summary in summaries.values()))
    for reason in sorted({reason for split in splits.values() for reason in split.audit.dropped}):
        counts = (split.audit.dropped[reason] for split in splits.values())
        print(f"{'rows dropped: ' + reason:32}" + "".join(f"{count:>12}" for count in counts))
    print(f"\nprompt style {style.name}, at most {limit} tokens a row. The first row, its supervised part in ⟦ ⟧:\n")
    if splits["train"].first:
        print(marked(*splits["train"].first, tokenizer))


def marked(ids: list[int], supervised: list[int], tokenizer: Tokenizer) -> str:
    parts, start = [], 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or supervised[i] != supervised[start]:
            text = tokenizer.decode(ids[start:i], skip_special_tokens=False)
            parts.append(f"⟦{text}⟧" if supervised[start] else text)
            start = i
    return "".join(parts)
