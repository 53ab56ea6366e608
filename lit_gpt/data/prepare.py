"""Prepares data for finetuning: rows to messages, messages to tokens, tokens to the data folder, with an audit.

The rows are read once: each is checked, rendered and tokenized into temporary files. Then splits are assigned, and
their files are written from spans of these. Memory holds a few rows at a time, and of each its record (30 bytes) and
its offset (8).
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lit_gpt.checkpoints.folder import check_checkpoint_dir
from lit_gpt.data import dataset
from lit_gpt.data.args import ColumnArgs, PrepareArgs
from lit_gpt.data.audit import Audit
from lit_gpt.data.conversations import BadRow, to_conversation
from lit_gpt.data.report import print_audit, print_next, print_unused
from lit_gpt.data.sources import Source, parse_sources
from lit_gpt.data.split_writer import SampleStore
from lit_gpt.data.tokenization import DUPLICATE, KEPT, REFUSED, UNSUPERVISED, Tokenization
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
    limit = length_limit(args)
    sources, validation_sources = parse_sources(rows), parse_sources(validation_rows) if validation_rows else []
    if any(source.weight != 1 for source in validation_sources):
        raise UserError("--validation_path: rows to validate on are taken once; leave the weight out")
    fraction, all_sources = None if validation_sources else args.validation_fraction, [*sources, *validation_sources]
    with new_folder(out_dir) as folder:
        store = SampleStore(folder)
        tokenization = Tokenization(args, tokenizer, style, limit, folder, store)
        counts = tokenize_rows(all_sources, args, columns, tokenization)
        times = assign_splits(sources, counts[: len(sources)], fraction, args.seed)
        times = np.append(times, np.full(sum(counts[len(sources) :]), VALIDATION, np.int8))
        refuse_by_template(tokenization, times, args)
        print_unused(tokenization.unused, tokenization.plain_rows)
        records, style = tokenization.records(), tokenization.style_of_rows()
        if args.deduplicate:
            mark_duplicates(records, times)
        warn_of_overlap(records, times)
        taken = {"train": np.maximum(times, 0), "validation": (times == VALIDATION).astype(np.int8)}
        kept = {name: np.repeat(np.arange(len(n)), n * (records["status"] == KEPT)) for name, n in taken.items()}
        audits = {name: Audit.of_rows(records, store.lengths(), n, args) for name, n in taken.items()}
        first = store.sample(int(kept["train"][0])) if len(kept["train"]) else None
        print_audit(audits, first, tokenizer, style, limit)
        refuse_unusable(audits, taken, tokenization, args, rows)
        if not validation_sources:
            kept["validation"] = shuffled(kept["validation"], args.seed)
        for name, rows_of_split in kept.items():
            store.write(folder / f"{name}.safetensors", rows_of_split)
        store.remove()
        tokenization.remove()
        record = {"max_seq_length": limit, "mask_inputs": args.mask_inputs, "seed": args.seed}
        record["sources"] = [vars(source) | {"rows": n} for source, n in zip(all_sources, counts, strict=True)]
        dataset.write_meta(folder, audits, tokenizer, style, **record)
    print_next(args.checkpoint_dir, out_dir, len(kept["train"]))


def length_limit(args: PrepareArgs) -> int:
    """Return how many tokens a row may have: as asked, at most what the model takes."""
    block_size = config_from_hf(read_json(args.checkpoint_dir / "config.json")).block_size
    limit = min(args.max_seq_length or block_size, block_size)
    if args.max_seq_length and args.max_seq_length > limit:
        print(f"--max_seq_length {args.max_seq_length}: the model takes {limit} tokens; longer rows are cut to {limit}")
    return limit


def shuffled(rows: np.ndarray, seed: int) -> np.ndarray:
    """Return rows in a random order."""
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed % 2**63)).numpy()]


def tokenize_rows(
    sources: list[Source], args: PrepareArgs, columns: ColumnArgs, tokenization: Tokenization
) -> list[int]:
    """Read and tokenize all rows, and return how many of each source can be used.

    Raises:
        UserError: names the first row that cannot be used and counts the others, unless `skip_bad_rows`.
    """
    counts, first, bad = [], "", 0
    for source in sources:
        rows = good = 0
        for row in tqdm(source.rows(), desc=f"tokenizing {source.name}", unit=" rows", disable=None):
            rows += 1
            try:
                conversation = to_conversation(row, columns)
                good += 1
            except BadRow as error:
                first = first or str(error)
                continue
            if not first or args.skip_bad_rows:  # else the rest is only counted
                tokenization.add(conversation)
        if not rows:
            raise UserError(f"{source.name}: holds no rows")
        counts.append(good)
        bad += rows - good
    tokenization.flush()
    if bad and not args.skip_bad_rows:
        more = f"; {bad - 1} more rows cannot be used either" if bad > 1 else ""
        raise UserError(first + more)
    if bad:
        print(f"{bad} rows cannot be used and are left out, the first: {first}")
    return counts


def assign_splits(sources: list[Source], counts: list[int], fraction: float | None, seed: int) -> np.ndarray:
    """Return how often each row is taken, int8 (rows,): by its source's weight, or VALIDATION for a random `fraction`.

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
        return drawn.numpy()
    taken = drawn.nonzero().squeeze(1)
    if not len(taken):
        raise UserError(f"{', '.join(f'{s.name}={s.weight:g}' for s in sources)}: such weights take none of the rows")
    held_out, given = max(1, round(fraction * len(taken))), f"--validation_fraction {fraction:g}"
    if held_out >= len(taken):
        names = ", ".join(source.name for source in sources)
        raise UserError(
            f"{given}: none of the {len(taken)} rows of {names} would be left to train on; give two or more, a lower "
            "fraction, or rows of their own to validate on by --validation_path"
        )
    if not fraction:
        print(f"{given}: a run must validate on something; 1 of the {len(taken)} rows is held out")
    drawn[taken[torch.randperm(len(taken), generator=generator)[:held_out]]] = VALIDATION
    return drawn.numpy()


def refuse_by_template(tokenization: Tokenization, times: np.ndarray, args: PrepareArgs) -> None:
    """Refuse the first row that is taken and that the template refuses, unless `skip_bad_rows`."""
    if not args.skip_bad_rows and (first := next((why for i, why in tokenization.noted(REFUSED) if times[i]), None)):
        raise UserError(first)


def mark_duplicates(records: np.ndarray, times: np.ndarray) -> None:
    """Set the status of rows that equal an earlier one; of rows that are taken, the first stays."""
    rows = np.flatnonzero((records["status"] == KEPT) & (times != 0))
    later = np.ones(len(rows), bool)
    later[np.unique(records["digest"][rows], return_index=True)[1]] = False
    records["status"][rows[later]] = DUPLICATE


def warn_of_overlap(records: np.ndarray, times: np.ndarray) -> None:
    """Say how many rows to validate on are trained on, too."""
    kept = records["status"] == KEPT
    validation, train = (records["digest"][kept & rows] for rows in (times == VALIDATION, times > 0))
    if shared := int(np.isin(validation, train).sum()):
        print(
            f"{shared} of the {len(validation)} validation rows are trained on, too: on them the loss does not show "
            "what is learned for new rows; --deduplicate true takes equal rows once, or validate on other rows"
        )


def refuse_unusable(
    audits: dict[str, Audit], taken: dict[str, np.ndarray], tokenization: Tokenization, args: PrepareArgs, rows: str
) -> None:
    """Refuse rows without a supervised token, unless `allow_unsupervised`, and splits without a row."""
    unsupervised = sum(audit.unsupervised for audit in audits.values())
    if unsupervised and not args.allow_unsupervised:
        split = next(name for name, audit in audits.items() if audit.unsupervised)
        first = next(where for i, where in tokenization.noted(UNSUPERVISED) if taken[split][i])
        if cut := sum(audit.unsupervised_cut for audit in audits.values()):
            hidden = f" (of {unsupervised - cut} the template does not show the answer)" if cut < unsupervised else ""
            why, mend = f" within --max_seq_length{hidden}", "raise it"
        else:
            why = f": the template '{tokenization.style.name}' does not show their answers as they are"
            mend = "choose another by --prompt_style"
        raise UserError(
            f"{unsupervised} rows have no supervised token{why}, the first is {first}; {mend}, or drop these rows with "
            "--allow_unsupervised true; nothing was written"
        )
    for name, audit in audits.items():
        if not audit.lengths:
            dropped = ", ".join(f"{n} for: {reason}" for reason, n in audit.dropped.items())
            given = f" (dropped {dropped})" if dropped else ""
            raise UserError(f"{rows}: no usable row is left for {name}{given}; give more rows; nothing was written")
