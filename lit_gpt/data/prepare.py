"""What the prepare scripts share: rows to messages, messages to tokens, tokens to the data folder, with an audit.

The rows are read twice: once to check and count all of them, so that those to validate on can be drawn, and once to
tokenize them. Neither holds more than a few at a time.
"""

from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace

import torch
from torch import Tensor
from tqdm import tqdm

from lit_gpt.checkpoints.folder import check_checkpoint_dir
from lit_gpt.data import dataset, split_writer
from lit_gpt.data.conversations import BadRow, Conversation, to_conversation
from lit_gpt.data.report import print_audit
from lit_gpt.data.sources import Source, parse_sources
from lit_gpt.data.tokenization import Tokenization
from lit_gpt.errors import UserError
from lit_gpt.families.registry import config_from_hf
from lit_gpt.files import check_new, new_folder, read_json
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.text.tokenizer import Tokenizer

VALIDATION = -1  # in place of how often a row is taken


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
    block_size = config_from_hf(read_json(hp.checkpoint_dir / "config.json")).block_size
    limit = min(hp.max_seq_length or block_size, block_size)
    sources, apart = parse_sources(rows), parse_sources(validation_rows) if validation_rows else []
    if any(source.weight != 1 for source in apart):
        raise UserError("--validation_path: rows to validate on are taken once; leave the weight out")
    counts = validate_rows([*sources, *apart], hp)
    times = assign_splits(sources, counts[: len(sources)], None if apart else hp.validation_fraction, hp.seed)
    times = torch.cat((times, torch.full((sum(counts) - len(times),), VALIDATION, dtype=torch.int8)))
    with new_folder(hp.destination_path) as folder:
        splits = {name: split_writer.SplitWriter(folder / f"{name}.safetensors") for name in dataset.SPLITS}
        tokenization = Tokenization(hp, tokenizer, style, limit, rows=len(times))
        found = conversations([*sources, *apart], counts, hp)
        bar = tqdm(found, desc="tokenizing", unit=" rows", total=len(times), disable=None)
        for conversation, n in zip(bar, times.tolist(), strict=True):
            if n:
                tokenization.add(conversation, splits["validation" if n == VALIDATION else "train"], abs(n))
        tokenization.flush()
        print_audit(splits, tokenizer, style, limit)
        refuse_unusable(splits, hp)
        splits["train"].finish()
        splits["validation"].finish(seed=None if apart else hp.seed)
        record = {"max_seq_length": limit, "mask_inputs": hp.mask_inputs, "seed": hp.seed}
        record["sources"] = [vars(source) | {"rows": n} for source, n in zip([*sources, *apart], counts, strict=True)]
        dataset.write_meta(folder, splits, tokenizer, style, **record)
    print(
        f"\nwrote {hp.destination_path}; next: python finetune/lora.py --checkpoint_dir {hp.checkpoint_dir} "
        f"--data_dir {hp.destination_path}"
    )


def validate_rows(sources: list[Source], hp: SimpleNamespace) -> list[int]:
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


def assign_splits(sources: list[Source], counts: list[int], fraction: float | None, seed: int) -> Tensor:
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


def refuse_unusable(splits: dict[str, split_writer.SplitWriter], hp: SimpleNamespace) -> None:
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
