"""Answers questions whose answers are known, and scores them: from prepared data, or from a file of rows."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lit_gpt.data.args import ColumnArgs
from lit_gpt.data.conversations import to_conversation
from lit_gpt.data.dataset import Dataset, read_meta
from lit_gpt.data.sources import parse_sources
from lit_gpt.errors import UserError
from lit_gpt.files import atomic
from lit_gpt.generation.engine import likeliest_answer
from lit_gpt.generation.steps import FastStep
from lit_gpt.model.gpt import GPT
from lit_gpt.text.metrics import Metric
from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.text.questions import Question, question_of
from lit_gpt.text.tokenizer import Tokenizer


def prepared_questions(data_dir: Path, split: str, tokenizer: Tokenizer) -> list[Question]:
    """Return the questions of a split of prepared data."""
    style = PromptStyle.from_dict(read_meta(data_dir, tokenizer)["prompt_style"])
    dataset, questions = Dataset(data_dir, split), []
    for sample in (dataset[i] for i in range(len(dataset))):
        try:
            ids, supervised = sample.tokens.tolist(), sample.supervised.tolist()
            questions.append(question_of(ids, supervised, tokenizer, style.stop_ids))
        except ValueError as error:
            raise UserError(f"--data_dir {data_dir}: sample {len(questions)} of {split} {error}") from None
    return questions


def row_questions(data_path: str, columns: ColumnArgs, tokenizer: Tokenizer, style: PromptStyle) -> list[Question]:
    """Return the questions of rows, rendered in a prompt style."""
    questions = []
    for source in parse_sources(data_path):
        for row in source.rows():
            conversation = to_conversation(row, columns)
            sample = style.encode_sample(conversation.messages, tokenizer, conversation.tools)
            try:
                questions.append(question_of(sample.ids, sample.supervised, tokenizer, style.stop_ids))
            except ValueError as error:
                raise UserError(f"{row.where}: {error}") from None
    if not questions:
        raise UserError(f"--data_path {data_path}: holds no rows")
    return questions


@torch.inference_mode()
def answer_all(
    model: GPT, questions: list[Question], tokenizer: Tokenizer, stop_ids: tuple[int, ...], tokens: int, name: str
) -> list[str]:
    """Return the likeliest answer to each question, of at most so many tokens."""
    step, answers = FastStep(model), []
    for question in tqdm(questions, desc=f"{name} answers", unit=" questions", disable=None):
        prompt = [*model.virtual_tokens, *question.ids]
        answers.append(tokenizer.decode(likeliest_answer(model, prompt, tokens, stop_ids, step)))
    return answers


@dataclass(frozen=True)
class Scores:
    """Holds the answers of each model to the same questions, with their scores.

    Attributes:
        answers: {model: its answers}; the last model is the one that is judged.
        scores: {model: for each question {metric: score}}; the first metric decides what is a miss.
    """

    questions: list[Question]
    answers: dict[str, list[str]]
    scores: dict[str, list[dict[str, float]]]

    @classmethod
    def of(cls, questions: list[Question], answers: dict[str, list[str]], metrics: dict[str, Metric]) -> "Scores":
        def score(question: Question, answer: str) -> dict[str, float]:
            found: dict[str, float] = {}
            for metric in metrics.values():
                found |= metric(question.text, question.wanted, answer)
            return found

        scores = {name: [score(*pair) for pair in zip(questions, own, strict=True)] for name, own in answers.items()}
        return cls(questions, answers, scores)

    def means(self) -> dict[str, dict[str, float]]:
        """Return {metric: {model: mean score}}; of a field over the questions whose wanted answers have it."""
        names = list(dict.fromkeys(name for rows in self.scores.values() for row in rows for name in row))
        columns = {
            name: {m: [row[name] for row in rows if name in row] for m, rows in self.scores.items()} for name in names
        }
        return {name: {m: sum(own) / len(own) for m, own in column.items()} for name, column in columns.items()}

    def misses(self) -> list[dict[str, Any]]:
        """Return the questions that the last model does not get wholly right, as lines of a file to read."""
        model = list(self.scores)[-1]
        first = next(iter(self.scores[model][0]))
        return [
            {"row": i, "question": question.text, "wanted": question.wanted}
            | {name: own[i] for name, own in self.answers.items()}
            | {"scores": self.scores[model][i]}
            for i, question in enumerate(self.questions)
            if self.scores[model][i][first] < 1
        ]

    def table(self) -> str:
        """Return the mean scores in per cent, a line for each metric and a column for each model."""
        models, means = list(self.scores), self.means()
        width = max(map(len, means))
        lines = [" " * width + "".join(f"{model:>12}" for model in models)]
        for name, row in means.items():
            lines.append(f"{name:{width}}" + "".join(f"{100 * row[model]:10.1f} %" for model in models))
        return "\n".join(lines)


def write_misses(path: Path, misses: list[dict[str, Any]]) -> None:
    """Write a line of JSON for each miss."""
    with atomic(path) as temporary:
        lines = (json.dumps(miss, ensure_ascii=False) + "\n" for miss in misses)
        temporary.write_text("".join(lines), encoding="utf-8")
