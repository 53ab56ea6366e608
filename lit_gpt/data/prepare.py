"""What the prepare scripts share: rows to messages, messages to tokens, tokens to the data folder, with an audit.

The rows are read twice: once to check and count all of them, so that those to validate on can be drawn, and once to
tokenize them. Neither holds more than a few at a time.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lit_gpt.checkpoints.folder import check_checkpoint_dir
from lit_gpt.data import dataset, split_writer
from lit_gpt.data.args import ColumnArgs, PrepareArgs
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


def prepare(
    args: PrepareArgs, columns: ColumnArgs, out_dir: Path, rows: str, validation_rows: str | None = None
) -> None:
    """Tokenize the rows, print the audit and write the data folder.

    Args:
        out_dir: folder to write.
        rows: sources, as `sources.parse_sources` reads them.
        validation_rows: sources to validate on; None: a share of the rows is split off.

    Raises:
        UserError: a row cannot be used, nothing is left to train or to validate on, or `out_dir` holds something.
    """
    check_checkpoint_dir(args.checkpoint_dir, converted=False)
    check_new(out_dir)
    tokenizer = Tokenizer(args.checkpoint_dir)
    style = PromptStyle.from_name(args.prompt_style, tokenizer)
    block_size = config_from_hf(read_json(args.checkpoint_dir / "config.json")).block_size
    limit = min(args.max_seq_length or block_size, block_size)
    sources, apart = parse_sources(rows), parse_sources(validation_rows) if validation_rows else []
    if any(source.weight != 1 for source in apart):
        raise UserError("--validation_path: rows to validate on are taken once; leave the weight out")
    counts = validate_rows([*sources, *apart], args, columns)
    times = assign_splits(sources, counts[: len(sources)], None if apart else args.validation_fraction, args.seed)
    times = torch.cat((times, torch.full((sum(counts) - len(times),), VALIDATION, dtype=torch.int8)))
    with new_folder(out_dir) as folder:
        splits = {name: split_writer.SplitWriter(folder / f"{name}.safetensors") for name in dataset.SPLITS}
        tokenization = Tokenization(args, tokenizer, style, limit, rows=len(times))
        found = conversations([*sources, *apart], counts, columns)
        bar = tqdm(found, desc="tokenizing", unit=" rows", total=len(times), disable=None)
        for conversation, n in zip(bar, times.tolist(), strict=True):
            if n:
                tokenization.add(conversation, splits["validation" if n == VALIDATION else "train"], abs(n))
        tokenization.flush()
        print_audit(splits, tokenizer, style, limit)
        refuse_unusable(splits, args)
        splits["train"].finish()
        splits["validation"].finish(seed=None if apart else args.seed)
        record = {"max_seq_length": limit, "mask_inputs": args.mask_inputs, "seed": args.seed}
        record["sources"] = [vars(source) | {"rows": n} for source, n in zip([*sources, *apart], counts, strict=True)]
        dataset.write_meta(folder, splits, tokenizer, style, **record)
    print(
        f"\nwrote {out_dir}; next: python finetune/lora.py --checkpoint_dir {args.checkpoint_dir} --data_dir {out_dir}"
    )


def validate_rows(sources: list[Source], args: PrepareArgs, columns: ColumnArgs) -> list[int]:
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
                to_conversation(row, columns)
                good += 1
            except BadRow as error:
                first = first or str(error)
        if not rows:
            raise UserError(f"{source.name}: holds no rows")
        counts.append(good)
        bad += rows - good
    if bad and not args.skip_bad_rows:
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


def conversations(sources: list[Source], counts: list[int], columns: ColumnArgs) -> Iterator[Conversation]:
    """The rows that can be used, those that `survey` has counted.

    Raises:
        UserError: there are now more or fewer.
    """
    for source, expected in zip(sources, counts, strict=True):
        count = 0
        for row in source.rows():
            with suppress(BadRow):
                conversation = to_conversation(row, columns)
                count += 1
                if count > expected:
                    break
                yield conversation
        if count != expected:
            raise UserError(
                f"{source.name}: changed while it was prepared, it no longer has {expected} usable rows; prepare it "
                "again when nothing writes to it; nothing was written"
            )


def refuse_unusable(splits: dict[str, split_writer.SplitWriter], args: PrepareArgs) -> None:
    unsupervised = sum(split.audit.unsupervised for split in splits.values())
    if unsupervised and not args.allow_unsupervised:
        not_verbatim = sum(split.audit.not_verbatim for split in splits.values())
        hint = (
            f" (of {not_verbatim} answers the template leaves something out, and they are not learnt)"
            if not_verbatim
            else ""
        )
        first = next(split.audit.first_unsupervised for split in splits.values() if split.audit.unsupervised)
        raise UserError(
            f"{unsupervised} rows have no supervised token within --max_seq_length, the first is {first}: raise it, or "
            f"drop these rows with --allow_unsupervised true{hint}; nothing was written"
        )
    for name, split in splits.items():
        if not split.rows:
            raise UserError(f"no usable row is left for {name}; nothing was written")
