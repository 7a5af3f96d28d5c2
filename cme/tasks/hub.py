"""Known benchmarks of the Hugging Face hub: their rows -> questions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cme.errors import DatasetError
from cme.tasks.expressions import MATH
from cme.tasks.matchers import CHOICE, CONTAINS, NUMERIC, Matcher, Task, normalise
from cme.tasks.questions import Question, Split, split_by_id

Row = Mapping[str, Any]


def mmlu(row: Row) -> Question:
    """cais/mmlu: question, subject, choices, answer (an index)."""
    choices = tuple(map(str, row["choices"]))
    id_ = _id(row["question"], *choices)
    return Question(id_, row["question"].strip(), (choices[int(row["answer"])],), _LETTER, choices)


def triviaqa(row: Row) -> Question:
    """mandarjoshi/trivia_qa, rc.nocontext: question_id, question, answer {value, aliases}."""
    answer = row["answer"]
    answers = tuple(dict.fromkeys([answer["value"], *answer["aliases"]]))
    return Question(str(row["question_id"]), row["question"].strip(), answers, "Answer briefly.")


def gsm8k(row: Row) -> Question:
    """openai/gsm8k, main: question, answer, whose last line is "#### 1,234"."""
    answer = row["answer"].rpartition("####")[2].strip()
    return Question(_id(row["question"]), row["question"].strip(), (answer,), _STEPS)


def math500(row: Row) -> Question:
    """HuggingFaceH4/MATH-500: problem, answer (LaTeX), unique_id."""
    return Question(str(row["unique_id"]), row["problem"].strip(), (row["answer"],), _BOXED)


def truthfulqa(row: Row) -> Question:
    """truthfulqa/truthful_qa, multiple_choice: question, mc1_targets {choices, labels}.

    The right option comes first in every row, so they are put in the order of their hashes.
    """
    targets = row["mc1_targets"]
    labels = dict(zip(targets["choices"], targets["labels"], strict=True))
    choices = tuple(sorted(labels, key=lambda choice: _id(row["question"], choice)))
    right = tuple(choice for choice in choices if labels[choice])
    return Question(_id(row["question"]), row["question"].strip(), right, _LETTER, choices)


_LETTER = "Answer with the letter of the right option."
_STEPS = "Solve the problem step by step and end with the answer: #### number."
_BOXED = r"Solve the problem and put the final answer in \boxed{}."


@dataclass(frozen=True)
class Source:
    """Attributes:
    repository, config: on the hub.
    splits: those of the hub for ours; one for both is split by the hashes of ids.
    """

    repository: str
    config: str | None
    splits: Mapping[Split, str]
    question: Callable[[Row], Question]
    matcher: Matcher
    about: str


SOURCES = {
    "mmlu": Source(
        "cais/mmlu",
        "all",
        {"train": "auxiliary_train", "held_out": "test"},
        mmlu,
        CHOICE,
        "MMLU, four options (MIT)",
    ),
    "triviaqa": Source(
        "mandarjoshi/trivia_qa",
        "rc.nocontext",
        {"train": "train", "held_out": "validation"},
        triviaqa,
        CONTAINS,
        "TriviaQA without documents",
    ),
    "gsm8k": Source(
        "openai/gsm8k",
        "main",
        {"train": "train", "held_out": "test"},
        gsm8k,
        NUMERIC,
        "grade-school word problems (MIT)",
    ),
    "math500": Source(
        "HuggingFaceH4/MATH-500",
        None,
        {"train": "test", "held_out": "test"},
        math500,
        MATH,
        "500 problems of MATH",
    ),
    "truthfulqa": Source(
        "truthfulqa/truthful_qa",
        "multiple_choice",
        {"train": "validation", "held_out": "validation"},
        truthfulqa,
        CHOICE,
        "TruthfulQA, MC1 (Apache-2.0)",
    ),
}


def hub_task(name: str) -> Task:
    source = SOURCES[name]

    def load(split: Split) -> list[Question]:
        questions = convert(_rows(source, split, name), source, name)
        return split_by_id(questions, split) if len(set(source.splits.values())) == 1 else questions

    return Task(name, f"{source.about}, from the hub: {source.repository}", load, source.matcher, "datasets")


def convert(rows: Iterable[Row], source: Source, name: str) -> list[Question]:
    """Questions in the order of `rows`, equal ones once. Raises DatasetError if a row has another schema."""
    questions: dict[str, Question] = {}
    for number_, row in enumerate(rows):
        try:
            question = source.question(row)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise DatasetError(
                f"row {number_} of {source.repository} does not have the columns that the task {name!r} reads "
                f"({type(error).__name__}: {error}); it has {', '.join(row)}"
            ) from error
        if problem := source.matcher.objection(question):
            raise DatasetError(f"row {number_} of {source.repository}: the question {problem}")
        questions.setdefault(question.id, question)
    return list(questions.values())


def _rows(source: Source, split: Split, name: str) -> Iterable[Row]:
    from datasets import load_dataset

    try:
        rows: Iterable[Row] = load_dataset(source.repository, source.config, split=source.splits[split])
    except Exception as error:  # readers of every format, and the network, raise their own
        raise DatasetError(
            f"the task {name!r} could not be loaded from the hub ({source.repository}): "
            f"{type(error).__name__}: {error}. Check the network, or give a file instead of a task's name."
        ) from error
    return rows


def _id(*texts: str) -> str:
    return hashlib.sha256("\n".join(map(normalise, texts)).encode()).hexdigest()[:16]
