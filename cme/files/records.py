"""The reader of all commands: a file's rows -> prompts, responses, and whether these ended by themselves.

COLUMNS says where each is by default; `Columns` are the options that name others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from cme.errors import DatasetError, TemplateError
from cme.files.strict_json import NotTaken, parse_json
from cme.files.tables import Csv, Malformed, Row, Table, open_table
from cme.options import option
from cme.text.messages import Messages, content_texts, generated_text

COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "instruction"),
    "response": ("response", "responses", "completion", "completions", "output", "outputs"),
    "messages": ("messages",),
    "finished": ("finished", "finish_reason"),
    "span": (),
    "id": ("id",),
    "answer": ("answer", "answers"),
    "correct": ("correct",),
    "choices": ("choices",),
}
"""The usual names of what a file may have, the preferred one first."""

MANY_COLUMNS = ("responses", "completions", "outputs")
"""Whose cells are lists where no row says otherwise."""

ROLES = ("system", "developer", "user", "assistant", "tool")
_FINISHED = {"true", "1", "stop", "eos", "eos_token", "end_turn", "stop_sequence", "tool_calls"}
_CUT_OFF = {"false", "0", "length", "max_tokens", "max_length"}


_WHERE = "where a file has what (default: columns with the usual names)"


@dataclass(frozen=True)
class Columns:
    """Options that name a file's columns; None finds the usual ones."""

    prompt_column: str | None = option(
        None, f"a text, or messages (default: {', '.join(COLUMNS['prompt'])})", group=_WHERE, metavar="NAME"
    )
    response_column: str | None = option(
        None,
        f"a text, a message, or a list of either (default: {', '.join(COLUMNS['response'])})",
        group=_WHERE,
        metavar="NAME",
    )
    messages_column: str | None = option(
        None,
        "conversations whose last message is the response (default: messages, if there is no prompt)",
        group=_WHERE,
        metavar="NAME",
    )
    finished_column: str | None = option(
        None,
        "whether a response ended by itself: true/false, or stop/length (default: "
        f"{', '.join(COLUMNS['finished'])})",
        group=_WHERE,
        metavar="NAME",
    )
    all_finished: bool = option(False, "every response ended by itself", group=_WHERE)
    span_column: str | None = option(
        None,
        "a part of the response to score alone too: a text in it (its last occurrence), or [start, end)",
        group=_WHERE,
        metavar="NAME",
    )


class RowProblem(ValueError):
    """Why a row, or a response of it, can't be scored."""


@dataclass(frozen=True)
class Example:
    """One response. `problem` says why it can't be scored, and then the other fields mean nothing.

    `span` is [start, end) in characters of the response's text, or a RowProblem if the row's is none.
    """

    prompt: str | Messages = ""
    response: str | Messages = ""
    finished: bool | None = None
    span: tuple[int, int] | RowProblem | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Layout:
    """Where a table has what.

    Attributes:
        prompt, response: columns; None if `messages` is the column of both. A file of prompts has no response.
        finished, span: columns, if there are any.
        many: a row has a list of responses.
        json_columns: those whose cells are JSON, in a format that has only texts.
    """

    prompt: str | None
    response: str | None
    messages: str | None
    finished: str | None
    span: str | None
    many: bool = False
    json_columns: frozenset[str] = frozenset()
    all_finished: bool = False

    @property
    def has_finished(self) -> bool:
        return self.all_finished or self.finished is not None


def find_column(table: Table, given: str | None, what: str) -> str | None:
    """The column that the option --`what`-column names, else the first of the usual ones; None if there is none.

    Raises DatasetError if the named one does not exist; the message names those that do.
    """
    names = table.survey.columns
    if given is not None and given not in names:
        raise DatasetError(
            f"{table.name} has no column {given!r}; it has {', '.join(names)}. "
            f"Name the right one with --{what}-column."
        )
    return given or next((name for name in COLUMNS[what] if name in names), None)


def find_layout(table: Table, columns: Columns, *, needs_responses: bool = True) -> Layout:
    """Choose the columns, and look through the rows until one shows whether it holds many responses.

    Raises DatasetError if a column is missing; the message names those that exist.
    """
    layout = _choose_columns(table, columns, needs_responses)
    if isinstance(table, Csv):  # in which every cell is a text
        structured = {*MANY_COLUMNS, layout.messages, layout.span, layout.finished}
        json_columns = frozenset(name for name in table.survey.columns if name in structured)
        layout = replace(layout, json_columns=json_columns)
    return layout if layout.response is None else with_many(layout, table.rows())


def with_many(layout: Layout, rows: Iterable[Row | Malformed]) -> Layout:
    """Whether a row holds many responses, as the first that shows it does."""
    assert layout.response is not None
    for row in rows:
        many = None if isinstance(row, Malformed) else _shows_many(_read(row, layout.response, layout))
        if many is not None:
            return replace(layout, many=many)
    return replace(layout, many=layout.response in MANY_COLUMNS)


def _shows_many(value: Any) -> bool | None:
    """Whether a response column's cell holds many responses; None if it does not tell.

    A list of one assistant's message does not: it is one response as TRL writes it, or a list of one response.
    Two such messages are two responses, for no conversation has an assistant answer itself.
    """
    if not isinstance(value, list):
        return None if value is None or isinstance(value, RowProblem) else False
    if not _is_conversation(value):
        return True
    return True if len(value) > 1 and _are_responses(value) else None


def _choose_columns(table: Table, columns: Columns, needs_responses: bool) -> Layout:
    names = table.survey.columns

    def required(found: str | None, what: str, option: str) -> str:
        if found is None:
            raise DatasetError(
                f"{table.name} has no column {_any_of(COLUMNS[what])}; it has {', '.join(names)}. "
                f"Name the right one with {option}."
            )
        return found

    named_pair = columns.prompt_column is not None or columns.response_column is not None
    if columns.messages_column is not None and named_pair:
        raise DatasetError("give --messages-column, or --prompt-column and --response-column, not both")
    prompt = find_column(table, columns.prompt_column, "prompt")
    response = find_column(table, columns.response_column, "response")
    messages = find_column(table, columns.messages_column, "messages")
    has_pair = prompt is not None and (response is not None or not needs_responses)
    if messages is not None and columns.messages_column is None and (named_pair or has_pair):
        messages = None
    if messages is not None:
        prompt = response = None
    else:
        prompt = required(prompt, "prompt", "--prompt-column (or --messages-column)")
        response = required(response, "response", "--response-column") if needs_responses else response
    finished = None if columns.all_finished else find_column(table, columns.finished_column, "finished")
    span = find_column(table, columns.span_column, "span")
    return Layout(prompt, response, messages, finished, span, all_finished=columns.all_finished)


def _any_of(names: Sequence[str]) -> str:
    *most, last = map(repr, names)
    return f"{', '.join(most)} or {last}" if most else last


@dataclass(frozen=True)
class Record:
    """A row.

    Attributes:
        number: its place among the file's rows, from 1.
        row: every column, cells of a CSV file that hold JSON read.
        prompt: a text or messages; None for a row of which `examples` say why it can't be read.
        examples: its responses; none in a file of prompts.
    """

    number: int
    row: Row
    prompt: str | Messages | None
    examples: list[Example]


class Records:
    """The rows of a file, in order, as prompts and responses."""

    def __init__(self, table: Table, columns: Columns | None = None, *, needs_responses: bool = True) -> None:
        """Raises DatasetError if the file lacks a column."""
        self.table = table
        self.layout = find_layout(table, columns or Columns(), needs_responses=needs_responses)

    def __iter__(self) -> Iterator[Record | Malformed]:
        for number, row in enumerate(self.table.rows(), 1):
            yield row if isinstance(row, Malformed) else record_of(row, self.layout, number)


def read_records(path: Path, columns: Columns | None = None, *, needs_responses: bool = True) -> Records:
    """The records of the file `path`. Raises DatasetError if it can't be read, or lacks a column."""
    return Records(open_table(path), columns, needs_responses=needs_responses)


def record_of(row: Row, layout: Layout, number: int) -> Record:
    """A row's prompt and responses."""
    read = {**row, **{name: _read(row, name, layout) for name in layout.json_columns}}
    if layout.response is None and layout.messages is None:
        assert layout.prompt is not None
        try:
            return Record(number, read, read_prompt(read.get(layout.prompt)), [])
        except RowProblem as problem:
            return Record(number, read, None, [Example(problem=str(problem))])
    examples = examples_of(row, layout)
    prompt = next((example.prompt for example in examples if example.problem is None), None)
    return Record(number, read, prompt, examples)


def examples_of(row: Row, layout: Layout) -> list[Example]:
    """The responses of a row, in order: one, or as many as its list has."""
    row = {**row, **{name: _read(row, name, layout) for name in layout.json_columns}}
    try:
        prompt, responses = _prompt_and_responses(row, layout)
    except RowProblem as problem:
        return [Example(problem=str(problem))] * _count(row, layout)
    finished = _spread(row.get(layout.finished) if layout.finished else None, len(responses), layout)
    span = row.get(layout.span) if layout.span else None
    if layout.many and _is_pair(span) and len(responses) == 2:
        span = [RowProblem(f"{span} may be a span or two answers: write texts, or a span a response")] * 2
    spans = _spread(span, len(responses), layout, _is_pair)
    return [
        _example(prompt, response, done, span, layout)
        for response, done, span in zip(responses, finished, spans, strict=True)
    ]


def _count(row: Row, layout: Layout) -> int:
    """How many responses a row has that can't be read, and thus how long the lists of its values are."""
    responses = row.get(layout.response) if layout.many and layout.response else None
    return len(responses) if _is_list_of_responses(responses) and responses else 1


def _example(prompt: str | Messages, value: Any, finished: Any, span: Any, layout: Layout) -> Example:
    try:
        response = _response(value)
    except RowProblem as problem:
        return Example(problem=str(problem))
    ended = True if layout.all_finished else read_finished(finished)
    return Example(prompt, response, ended, _span(span, response) if layout.span else None)


def _prompt_and_responses(row: Row, layout: Layout) -> tuple[str | Messages, list[Any]]:
    if layout.messages is not None:
        messages = _conversation(row.get(layout.messages), "the conversation")
        if messages[-1]["role"] != "assistant":
            raise RowProblem(f"the last message is from {messages[-1]['role']!r}, not from 'assistant'")
        if len(messages) == 1:
            raise RowProblem("no message comes before the response")
        return messages[:-1], [messages[-1:]]
    assert layout.prompt is not None
    assert layout.response is not None
    prompt = read_prompt(row.get(layout.prompt))
    responses = row.get(layout.response)
    if isinstance(responses, RowProblem):
        raise responses
    if responses is None:
        raise RowProblem("the response is missing")
    if not layout.many:
        if _shows_many(responses):
            raise RowProblem("there is a list of responses, unlike in other rows")
        return prompt, [responses]
    if not _is_list_of_responses(responses):
        raise RowProblem("there is no list of responses, unlike in other rows")
    return prompt, responses


def read_prompt(value: Any) -> str | Messages:
    """A prompt as it is. Raises RowProblem if it is neither a text nor messages."""
    return value if isinstance(value, str) else _conversation(value, "the prompt")


def _response(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        raise RowProblem("the response is missing")
    messages = _conversation([value] if isinstance(value, dict) else value, "the response")
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise RowProblem("the response must be one message, from 'assistant'")
    try:
        return generated_text(messages)
    except TemplateError as error:
        raise RowProblem(str(error)) from error


def _conversation(value: Any, name: str) -> list[Mapping[str, Any]]:
    if isinstance(value, RowProblem):
        raise value
    if not _is_conversation(value):
        if value is None:
            raise RowProblem(f"{name} is missing")
        raise RowProblem(f"{name} is neither a text nor a list of messages but {type(value).__name__}")
    for i, message in enumerate(value, 1):
        role = message.get("role")
        if role not in ROLES:
            raise RowProblem(f"message {i} has the unknown role {role!r}; known are {', '.join(ROLES)}")
        try:
            content_texts(message)
        except TemplateError as error:
            raise RowProblem(f"message {i}: {error}") from error
    return list(value)


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def _is_list_of_responses(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and (not _is_conversation(value) or _are_responses(value))


def _are_responses(messages: list[Any]) -> bool:
    return all(message.get("role") == "assistant" for message in messages)


def read_finished(value: Any) -> bool | None:
    """Whether a response ended by itself, from a flag or a reason; None if that is not known."""
    word = str(int(value) if isinstance(value, float) and value.is_integer() else value).lower()
    return True if word in _FINISHED else False if word in _CUT_OFF else None


def _span(value: Any, text: str) -> tuple[int, int] | RowProblem:
    if isinstance(value, RowProblem):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str):
        start = text.rfind(value) if value else -1
        return (
            (start, start + len(value)) if start >= 0 else RowProblem("the answer does not occur in the response")
        )
    if _is_pair(value):
        return value[0], value[1]
    return RowProblem("no span is given" if value is None else "the span is neither a text nor [start, end)")


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value)


def _spread(
    value: Any, count: int, layout: Layout, is_one: Callable[[Any], bool] = lambda value: False
) -> list[Any]:
    """One value for each of `count` responses: a list of them, or the same for all. `is_one` knows lists that are
    one value."""
    if layout.many and isinstance(value, list) and not is_one(value):
        return value[:count] + [None] * (count - len(value))
    return [value] * count


def _read(row: Row, column: str, layout: Layout) -> Any:
    """A row's value in a column, read as JSON if it is such; a RowProblem if that JSON is refused."""
    value = row.get(column)
    if column not in layout.json_columns or not isinstance(value, str):
        return value
    try:
        found = parse_json(value)
    except NotTaken as error:
        structured = value.lstrip().startswith(("[", "{"))  # else it is the text "NaN"
        return RowProblem(f"the column {column!r}: {error}") if structured else value
    except ValueError:
        return value
    return found if isinstance(found, str | list | dict) else value  # "42" may be an answer
