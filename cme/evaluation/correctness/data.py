"""Questions to be answered, or responses that are right or wrong: from a task, or from the rows of a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from cme.errors import CMEError, DatasetError
from cme.evaluation.correctness.options import Options
from cme.evaluation.correctness.signals import Response
from cme.files.records import COLUMNS, Columns, Record, Records, RowProblem, find_column
from cme.files.strict_json import parse_json
from cme.files.tables import Csv, Malformed, Row, Table, is_table, open_table
from cme.tasks.choices import LETTERS
from cme.tasks.matchers import Matcher, Task
from cme.tasks.questions import SPLITS, Question
from cme.tasks.registry import MATCHERS, find_matcher, find_task
from cme.text.messages import Messages, hide_thoughts, text_of


@dataclass(frozen=True)
class Data:
    """Either `questions`, which a generator is to answer, or `responses`.

    Attributes:
        about: for the record.
        matcher: tells which generated response is right.
        malformed: lines of a file that hold no row.
        package: where a task's questions come from.
    """

    about: str
    questions: Sequence[Question] = ()
    responses: Sequence[Response] = ()
    matcher: Matcher | None = None
    malformed: int = 0
    package: str | None = None


def load_data(options: Options) -> Data:
    """Raises CMEError if there is no such file or task, or if it lacks what is needed."""
    path = Path(options.data)
    if is_table(path) or "/" in options.data or path.is_file():
        return _from_file(open_table(path), options)
    return _from_task(find_task(options.data), options)


def _from_task(task: Task, options: Options) -> Data:
    for name, value in (("--matcher", options.matcher), ("--span-column", options.columns.span_column)):
        if value is not None:
            raise CMEError(f"{name} is for files: the task {task.name!r} has its own matcher")
    if options.generator is None:
        raise CMEError(f"the task {task.name!r} has questions alone: name the model that answers with --generator")
    splits = SPLITS[::-1] if options.split == "all" else (options.split,)  # held-out questions first
    questions = [question for split in splits for question in task.load(split)][: options.limit]
    about = f"{task.name}: {task.about}; {len(questions)} questions, split {options.split}"
    if not questions:
        raise DatasetError(f"the task {task.name!r} has no questions in its split {options.split!r}")
    return Data(about, questions=questions, matcher=task.matcher, package=task.package)


def judged(
    question: Question,
    text: str,
    matcher: Matcher | None,
    prompt: str | Messages,
    asked: str | Messages,
    finished: bool | None,
    correct: bool | None = None,
    span: tuple[int, int] | None = None,
    problem: str | None = None,
) -> Response:
    """A response to a question, with what the matcher finds in it where `correct` or `span` is not known."""
    found = None if matcher is None else matcher.find(text, question)
    if span is None and found is not None:
        span = found.start, found.end
    if correct is None:
        assert matcher is not None
        correct = matcher.accepts(text, found, question)
    answer = " ".join((hide_thoughts(text) or text).casefold().split()) if found is None else found.key
    return Response(question.id, prompt, asked, text, correct, span, answer, finished, problem)


def _from_file(table: Table, options: Options) -> Data:
    reader = _Reader(table, options)
    questions: dict[Question, None] = {}  # a set in order
    responses: list[Response] = []
    malformed = 0
    for record in reader.records:
        if isinstance(record, Malformed):
            malformed += 1
            continue
        try:
            question = reader.question(record)
            responses += (found := reader.responses(record, question))
        except RowProblem as problem:
            raise DatasetError(f"{table.path}, row {record.number}: {problem}") from problem
        if found or not reader.has_responses:
            questions[question] = None
    asked = list(questions)[: options.limit]
    if not reader.has_responses:
        about = f"{table.path}: {len(questions)} questions"
        return Data(about, questions=asked, matcher=reader.matcher, malformed=malformed)
    if not responses:
        raise DatasetError(f"{table.path} has no responses")
    about, kept = f"{table.path}: {len(responses)} responses", {question.id for question in asked}
    return Data(about, responses=[r for r in responses if r.question in kept], malformed=malformed)


class _Reader:
    """Rows of one file -> questions and responses. Rows with equal prompts ask one question.

    Labels are in the column `correct`, or come of gold answers and a matcher. Raises RowProblem without one.
    """

    def __init__(self, table: Table, options: Options) -> None:
        self.columns = {
            what: find_column(table, getattr(options, f"{what}_column"), what)
            for what in ("correct", "answer", "choices", "id")
        }
        answer = self.columns["answer"]
        needs_responses = options.generator is None or answer is None
        if options.generator is None and answer is not None and not _has_responses(table, options.columns):
            raise DatasetError(
                f"{table.path} has no responses ({', '.join(COLUMNS['response'])}); it has "
                f"{', '.join(table.survey.columns)}: name their column with --response-column, or the model that "
                "answers with --generator"
            )
        self.records = Records(table, options.columns, needs_responses=needs_responses)
        self.layout = self.records.layout
        self.has_responses = self.layout.response is not None or self.layout.messages is not None
        self.matcher = None if options.matcher is None else find_matcher(options.matcher)
        self.is_csv = isinstance(table, Csv)
        self._questions: dict[str, Question] = {}  # by prompt
        self._prompts: dict[str, str] = {}  # by id
        if self.columns["correct"] is None and answer is None:
            raise DatasetError(
                f"{table.path} has no column 'correct' (true or false) and none with gold answers, 'answer'; it "
                f"has {', '.join(table.survey.columns)}: name one with --correct-column, or with --answer-column "
                "and --matcher"
            )
        if not self.has_responses:
            self.columns["correct"] = None
        if self.columns["correct"] is not None:
            self.columns["answer"] = None
        elif self.matcher is None:
            raise CMEError(
                f"{table.path} has gold answers in its column {answer!r}: say what counts as right with "
                f"--matcher, one of {', '.join(MATCHERS)}"
            )

    def question(self, record: Record) -> Question:
        if record.prompt is None:
            raise RowProblem(str(record.examples[0].problem))
        prompt = record.prompt
        if not prompt:
            raise RowProblem("the prompt is empty")
        key, what = json.dumps(prompt, sort_keys=True, default=str), f"the question {text_of(prompt)[:60]!r}"
        choices = self._choices(record.row)
        answers = self._answers(record.row, choices)
        known = self._questions.get(key)
        if known is not None and (known.answers, known.choices) != (answers, choices):
            raise RowProblem(f"{what} came before with another right answer")
        id_ = self._id(record.row, key)
        if known is None:
            known = self._questions[key] = Question(id_, text_of(prompt), answers, choices=choices)
            if answers and self.matcher is not None and (problem := self.matcher.objection(known)):
                raise RowProblem(f"{what} {problem}; mend it, or take another --matcher")
        return known

    def responses(self, record: Record, question: Question) -> list[Response]:
        assert record.prompt is not None
        examples = record.examples
        # A row whose responses can't be read needs no labels
        is_read = any(example.problem is None for example in examples)
        labels = self._labels(record.row, len(examples)) if is_read else [False] * len(examples)
        responses = []
        for example, label in zip(examples, labels, strict=True):
            text, span = text_of(example.response), example.span if isinstance(example.span, tuple) else None
            known = (example.finished, label, span, example.problem)
            responses.append(judged(question, text, self.matcher, record.prompt, record.prompt, *known))
        return responses

    def _id(self, row: Row, key: str) -> str:
        known = self._questions.get(key)
        if (column := self.columns["id"]) is None:
            return known.id if known else str(len(self._questions))
        id_ = str(row.get(column))
        before = self._prompts.setdefault(id_, key)
        is_list = not self.has_responses or self.layout.many
        if before != key or (is_list and known is not None and known.id == id_):
            other = ", with another prompt" if before != key else ""
            raise RowProblem(
                f"the id {id_!r} came before{other}: ids must be unique, or leave the column out (rows with equal "
                "prompts ask one question)"
            )
        return known.id if known else id_

    def _labels(self, row: Row, count: int) -> list[bool | None]:
        if (column := self.columns["correct"]) is None:
            return [None] * count
        value = _parsed(row.get(column))
        values = value if isinstance(value, list) else [value]
        if len(values) != count:
            raise RowProblem(f"{len(values)} labels for {count} responses")
        labels = [_LABELS.get(str(value).strip().casefold()) for value in values]
        if None in labels:
            wrong = values[labels.index(None)]
            raise RowProblem(f"the column {column!r} holds {wrong!r:.80}: it must be true or false (or 1, 0)")
        return labels

    def _choices(self, row: Row) -> tuple[str, ...]:
        if (column := self.columns["choices"]) is None:
            return ()
        value = _parsed(row.get(column))
        if not isinstance(value, list) or not value or None in value:
            raise RowProblem(f"the column {column!r} holds no list of options")
        return tuple(map(str, value))

    def _answers(self, row: Row, choices: tuple[str, ...]) -> tuple[str, ...]:
        if (column := self.columns["answer"]) is None:
            return ()
        value = _parsed(row.get(column)) if self.is_csv else row.get(column)
        values = value if isinstance(value, list) else [value]
        if not values or any(v is None or str(v).strip() == "" for v in values):
            raise RowProblem(f"the column {column!r} holds no answer")
        return tuple(_option(v, choices) if choices else _gold(v) for v in values)


def _has_responses(table: Table, columns: Columns) -> bool:
    places = {"response": columns.response_column, "messages": columns.messages_column}
    return any(find_column(table, given, what) is not None for what, given in places.items())


_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def _gold(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():  # as Parquet has integers beside nulls
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal) or value != value:
        raise RowProblem(f"the answer {value!r} is neither a text nor a number: write it as a text")
    return str(value)


def _option(value: Any, choices: tuple[str, ...]) -> str:
    """The text of the option that a gold answer names."""
    named = options_named(value, choices)
    if not named:
        raise RowProblem(f"the answer {value!r} names none of the options {', '.join(choices)}")
    if len(named) > 1:
        raise RowProblem(
            f"the answer {value!r} may mean {' or '.join(sorted(named))} of the options {', '.join(choices)}, by "
            "its text or its place: give a letter that is no option, or in JSON or Parquet the index as a number"
        )
    return named.pop()


def options_named(value: Any, choices: tuple[str, ...]) -> set[str]:
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
        return parse_json(value)
    except ValueError:
        return value
