"""Checks of the data: labels lie where the answers are, answers end, text survives tokenizer and template."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch

from lit_gpt.data.dataset import Sample, Samples
from lit_gpt.data.packing import PackedRow
from lit_gpt.data.report import marked
from lit_gpt.errors import UserError
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.training.selfcheck.finding import Finding
from lit_gpt.training.selfcheck.subject import Subject

ROWS = 64  # so many samples are read
QUESTIONS, ANSWER = ("Who came first?", "Peel 12 pears"), "The seventh answer, 42."
OPENING = 3  # tokens before an answer by which its beginning is known; those further up may be one with the question


def check_data(subject: Subject, train: Samples) -> Iterator[Finding]:
    """Yield the findings about samples, as prepared and as rows of a batch."""
    tokenizer, style = subject.base.tokenizer, subject.style
    whole = [sample for sample in (train[i] for i in range(min(ROWS, len(train)))) if isinstance(sample, Sample)]
    if not whole:
        yield Finding("labels", None, f"{subject.objective.name} labels no tokens by itself")
    else:
        yield labels(subject)
        yield answers(whole, tokenizer, style, subject.meta)
        yield tokens(whole, tokenizer)
    yield template(tokenizer, style)


def labels(subject: Subject) -> Finding:
    """Check that a packed row's labels are the supervised tokens of its samples, each where it is to be predicted."""
    row: PackedRow = subject.objective.collate(subject.samples)
    wanted: list[tuple[int, int]] = []
    start = 0
    for sample in subject.samples:
        places = sample.supervised[1:].nonzero().flatten().tolist()
        wanted += [(start + i, int(sample.tokens[i + 1])) for i in places]
        start += len(sample.tokens) - 1
    found = list(zip(row.targets.positions.tolist(), row.targets.labels.tolist(), strict=True))
    wrong = len(set(found) ^ set(wanted))
    says = f"the {len(wanted)} labels of a packed row are the answers' tokens, each at the place before it"
    says += f": {wrong} are not" if wrong else ""
    return Finding("labels", not wrong, says, {"wrong": wrong, "shown": shown(subject)})


def shown(subject: Subject) -> str:
    """Return the text of a sample as the loss sees it, what is a label in brackets."""
    sample = min(subject.samples, key=lambda sample: len(sample.tokens))
    row: PackedRow = subject.objective.collate([sample])
    places = set((row.targets.positions + 1).tolist())
    ids = sample.tokens.tolist()
    return marked(ids, [int(i in places) for i in range(len(ids))], subject.base.tokenizer)


def answers(samples: list[Sample], tokenizer: Tokenizer, style: PromptStyle, meta: dict[str, Any]) -> Finding:
    """Check that answers are learned from where generation begins them to their end token."""
    opening = common_end(*(style.encode_prompt([question(text)], tokenizer) for text in QUESTIONS))[-OPENING:]
    masked, limit = meta.get("mask_inputs", True), meta.get("max_seq_length")
    begun = ended = n = 0
    for sample in samples:
        ids, spans = sample.tokens.tolist(), supervised_spans(sample)
        start, stop = spans[-1]
        n += 1
        begun += not masked or ids[:start][-len(opening) :] == opening or not opening
        ended += ids[stop - 1] in style.stop_ids or len(ids) == limit and stop == limit  # cut by --max_seq_length
    says = f"of {n} answers {begun} are learned from where generating begins, {ended} to their end token"
    if not style.stop_ids:
        says += "; the prompt style has no end token"
    figures = {"answers": n, "begun": begun, "ended": ended, "stop_ids": list(style.stop_ids)}
    return Finding("answers", begun > 0 and ended == n and bool(style.stop_ids), says, figures)


def supervised_spans(sample: Sample) -> list[tuple[int, int]]:
    """Return from and to which token each supervised stretch of a sample reaches."""
    runs = [(key, len(list(run))) for key, run in groupby(sample.supervised.tolist())]
    ends = [sum(n for _, n in runs[: i + 1]) for i in range(len(runs))]
    return [(end - n, end) for (key, n), end in zip(runs, ends, strict=True) if key]


def common_end(a: list[int], b: list[int]) -> list[int]:
    """Return the longest list with which both end."""
    n = next((i for i, (x, y) in enumerate(zip(reversed(a), reversed(b), strict=False)) if x != y), min(len(a), len(b)))
    return a[len(a) - n :]


def question(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def tokens(samples: list[Sample], tokenizer: Tokenizer) -> Finding:
    """Check that the text of samples makes their tokens again."""
    again = 0
    for sample in samples:
        text = tokenizer.decode(sample.tokens, skip_special_tokens=False)
        bos = bool(len(sample.tokens)) and int(sample.tokens[0]) == tokenizer.bos_id
        repeated = tokenizer.decode(tokenizer.encode(text, bos=bos), skip_special_tokens=False)
        again += repeated == text
    says = f"of {len(samples)} samples the text of {again} is the same once tokenized and decoded again"
    return Finding("tokens", again == len(samples), says, {"rows": len(samples), "same": again})


def template(tokenizer: Tokenizer, style: PromptStyle) -> Finding:
    """Check that a conversation is trained as it is generated: the prompt, then the answer and an end token."""
    messages = [question(QUESTIONS[0]), {"role": "assistant", "content": ANSWER}]
    try:
        sample, prompt = style.encode_sample(messages, tokenizer), style.encode_prompt(messages[:1], tokenizer)
    except UserError as error:
        return Finding("template", False, str(error))
    learned = [i for i, supervised in zip(sample.ids, sample.supervised, strict=True) if supervised]
    ends = bool(learned) and learned[-1] in style.stop_ids
    text = tokenizer.decode(torch.tensor(learned[:-1] if ends else learned), skip_special_tokens=False)
    begins, whole = sample.ids[: len(prompt)] == prompt, text.strip() == ANSWER
    faults = [
        words
        for wrong, words in (
            (not begins, "what is trained does not begin as what is generated from"),
            (not whole, f"of the answer {text!r} is learned"),
            (not ends, "no end token is learned, so answers would not end"),
        )
        if wrong
    ]
    claim = f"the prompt style {style.name} trains the prompt that is generated from, the answer and an end token"
    return Finding("template", whole and ends, "; ".join([claim, *faults]), {"style": style.name, "faults": faults})
