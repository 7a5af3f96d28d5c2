"""The rows of a file -> the data of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from cme.errors import CMEError, DatasetError
from cme.evaluation.correctness.data import Data, Response
from cme.evaluation.correctness.options import Options
from cme.files.records import (
    COLUMNS,
    MANY_COLUMNS,
    Example,
    Layout,
    examples_of,
    with_many,
)
from cme.files.tables import Csv, Malformed, Row, Table
from cme.tasks.choices import LETTERS
from cme.tasks.matchers import Matcher
from cme.tasks.questions import Question
from cme.tasks.registry import MATCHERS, find_matcher
from cme.text.messages import hide_thoughts
from cme.text.rendering import Messages, text_of


def read_file(table: Table, options: Options) -> Data:
    """Raises CMEError if the file lacks a column, or a row a label."""
    if options.candidates:
        raise CMEError("--candidates is for tasks: the responses of a file are in its response column")
    columns = _find_columns(table, options)
    matcher = None if options.matcher is None else find_matcher(options.matcher)
    if columns.correct is None and matcher is None:
        raise CMEError(
            f"{table.path} has gold answers in its column {columns.answer!r}: say what counts as right with "
            f"--matcher, one of {', '.join(MATCHERS)}"
        )
    rows = list(table.rows())
    malformed = [row for row in rows if isinstance(row, Malformed)]
    reader = _Reader(table, columns, matcher)
    sound = [(i, row) for i, row in enumerate(rows, 1) if not isinstance(row, Malformed)]
    if columns.layout is None:
        questions = list(dict.fromkeys(reader.question(row, i) for i, row in sound))
        about = f"{table.path}: {len(questions)} questions"
        return Data(about, questions=questions[: options.limit], matcher=matcher, malformed=malformed)
    responses = [response for i, row in sound for response in reader.responses(row, i)]
    if not responses:
        raise DatasetError(f"{table.path} has no responses")
    about = f"{table.path}: {len(responses)} responses"
    kept = set(list(dict.fromkeys(r.question for r in responses))[: options.limit])
    return Data(about, responses=[r for r in responses if r.question in kept], malformed=malformed)


@dataclass(frozen=True)
class _Columns:
    """Where a file has what; `layout` is that of `cme score`. Labels are in `correct` or come of gold answers."""

    layout: Layout | None
    prompt: str
    correct: str | None
    answer: str | None
    choices: str | None
    id: str | None


def _find_columns(table: Table, options: Options) -> _Columns:
    names = table.survey.columns

    def find(given: str | None, usual: Sequence[str], option: str) -> str | None:
        if given is not None and given not in names:
            raise DatasetError(
                f"{table.path} has no column {given!r}; it has {', '.join(names)}. "
                f"Name the right one with {option}."
            )
        return given or next((name for name in usual if name in names), None)

    prompt = find(options.prompt_column, ("prompt", "question"), "--prompt-column")
    response = find(options.response_column, COLUMNS["response"], "--response-column")
    correct = find(options.correct_column, ("correct",), "--correct-column")
    answer = find(options.answer_column, ("answer", "answers"), "--answer-column")
    choices = find(options.choices_column, ("choices",), "--choices-column")
    span = find(options.span_column, (), "--span-column")
    id_ = find(options.id_column, ("id",), "--id-column")
    there = f"; it has {', '.join(names)}"
    if prompt is None:
        raise DatasetError(
            f"{table.path} has no column 'prompt' or 'question'{there}: name it with --prompt-column"
        )
    if correct is None and answer is None:
        raise DatasetError(
            f"{table.path} has no column 'correct' (true or false) and none with gold answers, 'answer'{there}: "
            "name one with --correct-column, or with --answer-column and --matcher"
        )
    if response is None and (options.generator is None or answer is None):
        raise DatasetError(
            f"{table.path} has no column with responses ({', '.join(COLUMNS['response'])}){there}: name it with "
            "--response-column, or give gold answers and a --generator that responds"
        )
    if response is None:
        return _Columns(None, prompt, None, answer, choices, id_)
    structured = {*MANY_COLUMNS, "choices", choices, correct, answer, span} if isinstance(table, Csv) else set()
    layout = Layout(
        prompt=prompt,
        response=response,
        messages=None,
        finished=find(None, COLUMNS["finished"], ""),
        span=span,
        json_columns=frozenset(name for name in names if name in structured),
    )
    gold = answer if correct is None else None
    return _Columns(with_many(layout, table.rows()), prompt, correct, gold, choices, id_)


class _Reader:
    """Rows of one file -> questions and responses. Rows with equal prompts ask one question."""

    def __init__(self, table: Table, columns: _Columns, matcher: Matcher | None) -> None:
        self.table, self.columns, self.matcher = table, columns, matcher
        self._questions: dict[str, Question] = {}  # by prompt
        self._prompts: dict[str, str] = {}  # by id
        self._many = columns.layout is None or columns.layout.many

    def question(self, row: Row, number: int) -> Question:
        prompt = row.get(self.columns.prompt)
        if not prompt:
            raise self._error(number, f"the column {self.columns.prompt!r} is empty")
        if not isinstance(prompt, str) and not (
            isinstance(prompt, list) and all(isinstance(m, dict) for m in prompt)
        ):
            raise self._error(number, f"the column {self.columns.prompt!r} holds neither a text nor messages")
        key = json.dumps(prompt, sort_keys=True, default=str)
        choices = self._choices(row, number)
        answers = self._answers(row, choices, number)
        known = self._questions.get(key)
        if known is not None and (known.answers, known.choices) != (answers, choices):
            raise self._error(
                number, f"the question {text_of(prompt)[:60]!r} came before with another right answer"
            )
        id_ = self._id(row, number, key)
        if known is None:
            known = self._questions[key] = Question(id_, text_of(prompt), answers, choices=choices)
            if answers and self.matcher is not None and (problem := self.matcher.objection(known)):
                raise self._error(
                    number, f"the question {text_of(prompt)[:60]!r} {problem}; mend it, or take another --matcher"
                )
        return known

    def responses(self, row: Row, number: int) -> Iterator[Response]:
        assert self.columns.layout is not None
        question = self.question(row, number)
        examples = examples_of(row, self.columns.layout)
        # A row whose responses can't be read needs no labels
        is_read = any(example.problem is None for example in examples)
        labels = self._labels(row, len(examples), number) if is_read else [False] * len(examples)
        for example, label in zip(examples, labels, strict=True):
            yield self._response(question, example, label, row[self.columns.prompt])

    def _response(
        self, question: Question, example: Example, label: bool | None, prompt: str | Messages
    ) -> Response:
        text = text_of(example.response)
        found = None if self.matcher is None else self.matcher.find(text, question)
        span = example.span if isinstance(example.span, tuple) else None
        if span is None and found is not None:
            span = found.start, found.end
        if label is None:
            assert self.matcher is not None
            label = self.matcher.accepts(text, found, question)
        answer = " ".join((hide_thoughts(text) or text).casefold().split()) if found is None else found.key
        return Response(question.id, prompt, prompt, text, label, span, answer, example.finished, example.problem)

    def _id(self, row: Row, number: int, key: str) -> str:
        known = self._questions.get(key)
        if self.columns.id is None:
            return known.id if known else str(len(self._questions))
        id_ = str(row.get(self.columns.id))
        before = self._prompts.setdefault(id_, key)
        if before != key or (self._many and known is not None and known.id == id_):
            raise self._error(
                number,
                f"the id {id_!r} came before"
                + (", with another prompt" if before != key else "")
                + ": ids must be unique, or leave the column out (rows with equal prompts ask one question)",
            )
        return known.id if known else id_

    def _labels(self, row: Row, count: int, number: int) -> list[bool | None]:
        if self.columns.correct is None:
            return [None] * count
        value = _parsed(row.get(self.columns.correct))
        values = value if isinstance(value, list) else [value]
        if len(values) != count:
            raise self._error(number, f"{len(values)} labels for {count} responses")
        return [self._label(value, number) for value in values]

    def _label(self, value: Any, number: int) -> bool:
        word = str(value).strip().casefold()
        if word in ("true", "1", "1.0", "false", "0", "0.0"):
            return word in ("true", "1", "1.0")
        raise self._error(
            number, f"the column {self.columns.correct!r} holds {value!r}: it must be true or false (or 1, 0)"
        )

    def _choices(self, row: Row, number: int) -> tuple[str, ...]:
        if self.columns.choices is None:
            return ()
        value = _parsed(row.get(self.columns.choices))
        if not isinstance(value, list) or not value or None in value:
            raise self._error(number, f"the column {self.columns.choices!r} holds no list of options")
        return tuple(map(str, value))

    def _answers(self, row: Row, choices: tuple[str, ...], number: int) -> tuple[str, ...]:
        if self.columns.answer is None:
            return ()
        value = _parsed(row.get(self.columns.answer)) if self._is_csv else row.get(self.columns.answer)
        values = value if isinstance(value, list) else [value]
        if not values or any(v is None or str(v).strip() == "" for v in values):
            raise self._error(number, f"the column {self.columns.answer!r} holds no answer")
        return tuple(self._option(v, choices, number) if choices else self._gold(v, number) for v in values)

    def _gold(self, value: Any, number: int) -> str:
        if isinstance(value, float) and value.is_integer():  # as Parquet has integers beside nulls
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal) or value != value:
            raise self._error(number, f"the answer {value!r} is neither a text nor a number: write it as a text")
        return str(value)

    def _option(self, value: Any, choices: tuple[str, ...], number: int) -> str:
        """The text of the option that a gold answer names."""
        named = _named(value, choices)
        options = ", ".join(choices)
        if not named:
            raise self._error(number, f"the answer {value!r} names none of the options {options}")
        if len(named) > 1:
            raise self._error(
                number,
                f"the answer {value!r} may mean {' or '.join(sorted(named))} of the options {options}, by its "
                "text or its place: give a letter that is no option, or in JSON or Parquet the index as a number",
            )
        return named.pop()

    @property
    def _is_csv(self) -> bool:
        return isinstance(self.table, Csv)

    def _error(self, number: int, why: str) -> DatasetError:
        return DatasetError(f"{self.table.path}, row {number}: {why}")


def _named(value: Any, choices: tuple[str, ...]) -> set[str]:
    """The options that a gold answer may name: a number by its index from 0, a text by text, letter or index."""
    is_index = isinstance(value, int) and not isinstance(value, bool)
    text = str(value).strip()
    named = set() if is_index else {text} & set(choices)
    index = int(text) if text.isdecimal() else LETTERS.find(text) if len(text) == 1 else -1
    return named | set(choices[index : index + 1]) if index >= 0 else named


def _parsed(value: Any) -> Any:
    """A cell that may hold JSON, as in CSV."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
