"""Questions that reasoning-gym makes, with its own scorers."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cme.tasks.matchers import NUMERIC, Matcher, Task, extract_number, extract_whole
from cme.tasks.numbers import is_number, read_number
from cme.tasks.questions import Answer, Question, Split, require, split_by_id

SIZE = 900
"""Questions made of a data set, of which equal ones are kept once."""

_TAGS = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)


def _create(dataset: str, task: str, **config: Any) -> Any:
    return require("reasoning_gym", f"the task {task!r}").create_dataset(dataset, size=SIZE, seed=0, **config)


def _load_arithmetic(split: Split) -> list[Question]:
    size = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2, "operators": ["+", "-", "*"]}
    data = _create("basic_arithmetic", "arithmetic", **size, allow_parentheses=False, allow_negation=False)
    return _questions(data, NUMERIC, split)


ARITHMETIC = Task(
    "arithmetic",
    "sums, differences and products of two numbers below 100 (reasoning-gym, Apache-2.0)",
    _load_arithmetic,
    NUMERIC,
    "reasoning-gym",
)


def names() -> frozenset[str]:
    """Every data set of reasoning-gym; none if it is not installed."""
    try:
        return frozenset(importlib.import_module("reasoning_gym.factory").DATASETS)
    except ImportError:
        return frozenset()


def generated_task(name: str) -> Task:
    """The data set `name` of reasoning-gym, in its default configuration."""
    data = _create(name, name)
    entries = list(data)
    matcher = scored_by(data.score_answer, numeric=answered_by_numbers(entries))
    about = f"reasoning-gym's {name} (Apache-2.0), {SIZE} questions in its default configuration"
    return Task(name, about, lambda split: _questions(entries, matcher, split), matcher, "reasoning-gym")


def answered_by_numbers(entries: Iterable[Mapping[str, Any]]) -> bool:
    """True if all the right answers of a data set are numbers."""
    answers = [str(entry["answer"]) for entry in entries if entry["answer"] is not None]
    return bool(answers) and all(map(is_number, answers))


def scored_by(score: Callable[[str, dict[str, Any]], float], *, numeric: bool) -> Matcher:
    """The matcher that calls right what `score`, given the answer and the data set's entry, gives its full mark 1.

    The answer is in <answer> tags, else in a `numeric` data set the last number, else the whole response. The same
    rule holds for all questions of a data set, so that the place of an answer says nothing about the right one.
    """

    def extract(response: str, question: Question) -> Answer | None:
        tagged = list(_TAGS.finditer(response))
        if tagged:
            return Answer(*tagged[-1].span(1), tagged[-1][1])
        return (extract_number if numeric else extract_whole)(response, question)

    def judge(response: str, answer: Answer | None, question: Question) -> bool:
        if answer is None:
            return False
        texts = {response[answer.start : answer.end]}
        if numeric:  # most scorers compare texts, and would not know 1,234 or 7.0
            texts |= {str(found.value) for found in map(read_number, texts) if found}
        return any(score(text, dict(question.metadata)) >= 1 for text in texts)

    return Matcher(extract, judge)


def _questions(data: Iterable[Mapping[str, Any]], matcher: Matcher, split: Split) -> list[Question]:
    """Without those that a copy of the question answers."""
    distinct = {question.id: question for question in map(_question, data)}
    return split_by_id((q for q in distinct.values() if not matcher.is_correct(q.text, q)), split)


def _question(entry: Mapping[str, Any]) -> Question:
    # Puzzles with many solutions have no answer of their own
    answers = () if entry["answer"] is None else (str(entry["answer"]),)
    text = entry["question"].strip()
    return Question(text, text, answers, "Answer briefly.", metadata=entry)
