"""The reader of all commands: a file's rows -> prompts, responses, and whether these ended by themselves.

COLUMNS says where each is by default; `Columns` are the options that name others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
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

ALPACA_EVAL = frozenset({"instruction", "output", "generator"})
"""Columns of AlpacaEval's files. Where all of them are, only the first of the usual names goes before these."""

MANY_COLUMNS = ("responses", "completions", "outputs")
"""Columns whose cells are lists where no row says otherwise."""

ROLES = ("system", "developer", "user", "assistant", "tool")
_FINISHED = {"true", "1", "stop", "eos", "eos_token", "end_turn", "stop_sequence", "tool_calls"}
_CUT_OFF = {"false", "0", "length", "max_tokens", "max_length"}


def _named(help: str, what: str | None = None) -> Any:
    """An option that names a column."""
    usual = "" if what is None else f" (default: {', '.join(COLUMNS[what])})"
    return option(None, help + usual, group=_WHERE, metavar="NAME")


_WHERE = "where a file has what (default: columns with the usual names)"


@dataclass(frozen=True)
class Columns:
    """Options that name a file's columns; None finds the usual ones."""

    prompt_column: str | None = _named("a text, or messages", "prompt")
    response_column: str | None = _named("a text, a message, or a list of either", "response")
    messages_column: str | None = _named(
        "conversations whose last message is the response (default: messages, if there is no prompt)"
    )
    finished_column: str | None = _named(
        "whether a response ended by itself: true/false, or stop/length", "finished"
    )
    all_finished: bool = option(False, "every response ended by itself", group=_WHERE)
    span_column: str | None = _named(
        "a part of the response to score alone too: a text in it (its last occurrence), or [start, end)"
    )


class RowProblem(ValueError):
    """The reason that a row, or a response of it, can't be scored."""


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
    """The columns of a table by their roles.

    Attributes:
        prompt, response: columns; None if `messages` is the column of both. A file of prompts has no response, one
            whose rows are known by ids perhaps no prompt.
        finished, span: columns, if there are any.
        many: a row has a list of responses.
        json_columns: those whose cells are JSON, in a format that has only texts.
        needs_prompts: a row without a prompt can't be read.
        input_problem: why a row with something in its column `input` can't be read; None if it can.
    """

    prompt: str | None
    response: str | None
    messages: str | None
    finished: str | None
    span: str | None
    many: bool = False
    json_columns: frozenset[str] = frozenset()
    all_finished: bool = False
    needs_prompts: bool = True
    input_problem: str | None = None

    @property
    def has_finished(self) -> bool:
        return self.all_finished or self.finished is not None


@dataclass(frozen=True)
class Record:
    """A row.

    Attributes:
        number: its place among the file's rows, from 1.
        row: every column, cells of a CSV file that hold JSON read.
        prompt: a text or messages; None if `examples` say why it can't be read, or if none is needed or there.
        examples: its responses; none in a file of prompts.
    """

    number: int
    row: Row
    prompt: str | Messages | None
    examples: list[Example]


class Records:
    """The rows of a table, in order, as prompts and responses."""

    def __init__(
        self,
        table: Table,
        columns: Columns | None = None,
        *,
        needs_responses: bool = True,
        needs_prompts: bool = True,
        options: Collection[str] = ("prompt", "response", "messages"),
    ) -> None:
        """Raises DatasetError if the table lacks a column.

        Args:
            needs_responses: False for a file of prompts.
            needs_prompts: False for a file of responses whose prompts may be in another one.
            options: the columns that the command has an option --…-column for, which that error may name.
        """
        self.table = table
        self.needs_responses = needs_responses
        self.layout = _find_layout(table, columns or Columns(), needs_responses, needs_prompts, options)

    def __iter__(self) -> Iterator[Record | Malformed]:
        for number, row in enumerate(self.table.rows(), 1):
            yield row if isinstance(row, Malformed) else _record(row, self.layout, number)

    def all(self) -> list[Record]:
        """Every record. Raises DatasetError for the first row whose prompt, or needed response, can't be read."""
        found = []
        for record in self:
            if isinstance(record, Malformed):
                raise DatasetError(f"line {record.line} of {self.table.name} can't be read: {record.reason}")
            problem = next((example.problem for example in record.examples if example.problem is not None), None)
            if problem is not None and (self.needs_responses or record.prompt is None):
                raise DatasetError(f"row {record.number} of {self.table.name} can't be read: {problem}")
            found.append(record)
        return found


def read_records(path: Path, columns: Columns | None = None, **how: Any) -> Records:
    """The records of the file `path`; `how` are further arguments of `Records`.

    Raises DatasetError if the file can't be read, or lacks a column.
    """
    return Records(open_table(path), columns, **how)


def all_records(path: Path, **how: Any) -> list[Record]:
    """All records of a file, for a command without options that name columns; `how` are arguments of `Records`.

    Raises DatasetError if the file, a row's prompt, or a needed response can't be read.
    """
    return read_records(path, options=(), **how).all()


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
    usual = COLUMNS[what]
    if ALPACA_EVAL.issubset(names):
        usual = (*usual[:1], *sorted(usual[1:], key=lambda name: name not in ALPACA_EVAL))
    return given or next((name for name in usual if name in names), None)


def _find_layout(
    table: Table, columns: Columns, needs_responses: bool, needs_prompts: bool, options: Collection[str]
) -> Layout:
    """Choose the columns, and look through the rows until one shows whether it holds many responses.

    Raises DatasetError if a column is missing; the message names those that exist.
    """
    named_pair = columns.prompt_column is not None or columns.response_column is not None
    if columns.messages_column is not None and named_pair:
        raise DatasetError("give --messages-column, or --prompt-column and --response-column, not both")
    prompt = find_column(table, columns.prompt_column, "prompt")
    response = find_column(table, columns.response_column, "response")
    messages = find_column(table, columns.messages_column, "messages")
    has_pair = prompt is not None and (response is not None or not needs_responses)
    if messages is None or (columns.messages_column is None and (named_pair or has_pair)):
        messages = None
        if needs_prompts:
            prompt = _required(table, prompt, ("prompt", "messages"), options)
        if needs_responses:
            response = _required(table, response, ("response",), options)
    else:
        prompt = response = None
    finished = None if columns.all_finished else find_column(table, columns.finished_column, "finished")
    span = find_column(table, columns.span_column, "span")
    structured = {*MANY_COLUMNS, messages, span, finished} if isinstance(table, Csv) else set()
    json_columns = frozenset(name for name in table.survey.columns if name in structured)
    many = response is not None and _has_many(table.rows(), response, json_columns)
    return Layout(
        prompt,
        response,
        messages,
        finished,
        span,
        many,
        json_columns,
        all_finished=columns.all_finished,
        needs_prompts=needs_prompts,
        input_problem=input_problem(prompt, columns.prompt_column, options),
    )


def input_problem(prompt: str | None, given: str | None, options: Collection[str]) -> str | None:
    """The reason why rows with something in a column `input` can't be read, if the column of prompts is the
    `instruction` of Alpaca's files, unless it was `given`. `options` are as `Records` takes them."""
    if prompt != "instruction" or given is not None:
        return None
    named = ", or name the prompt with --prompt-column" if "prompt" in options else ""
    return (
        "the column `input` belongs to the prompt, of which `instruction` is a part: join both in a column "
        f"`prompt`{named}"
    )


def _required(table: Table, found: str | None, places: tuple[str, ...], options: Collection[str]) -> str:
    """The column of the first of `places`; the others are where else it may be."""
    if found is None:
        *most, last = map(repr, COLUMNS[places[0]])
        named = " or ".join(f"--{place}-column" for place in places if place in options)
        raise DatasetError(
            f"{table.name} has no column {', '.join(most)} or {last}; it has {', '.join(table.survey.columns)}. "
            + (f"Name the right one with {named}." if named else "Rename the right one.")
        )
    return found


def _has_many(rows: Iterable[Row | Malformed], response: str, json_columns: frozenset[str]) -> bool:
    for row in rows:
        value = None if isinstance(row, Malformed) else row.get(response)
        many = _shows_many(_from_json(value, response) if response in json_columns else value)
        if many is not None:
            return many
    return response in MANY_COLUMNS


def _shows_many(value: Any) -> bool | None:
    """True if a cell of responses holds many, False if it holds one, None if it does not tell.

    A list of one assistant's message does not: it is one response as TRL writes it, or a list of one response.
    Two such messages are two responses, for no conversation has an assistant answer itself.
    """
    if not isinstance(value, list):
        return None if value is None or isinstance(value, RowProblem) else False
    if not _is_conversation(value):
        return True
    return True if len(value) > 1 and _are_responses(value) else None


def _record(row: Row, layout: Layout, number: int) -> Record:
    """A row's prompt and responses."""
    row = {**row, **{name: _from_json(row.get(name), name) for name in layout.json_columns}}
    prompt: str | Messages | None = None
    try:
        if layout.messages is None:
            prompt = _prompt(row, layout)
            responses = [] if layout.response is None else _responses(row.get(layout.response), layout.many)
        else:
            prompt, response = _exchange(row.get(layout.messages))
            responses = [response]
    except RowProblem as problem:
        return Record(number, row, prompt, [Example(problem=str(problem))] * _count(row, layout))
    return Record(number, row, prompt, _examples(prompt or "", responses, row, layout))


def _prompt(row: Row, layout: Layout) -> str | Messages | None:
    """None if there is none, and none is needed."""
    if layout.input_problem is not None and str(row.get("input") or "").strip():
        raise RowProblem(layout.input_problem)
    value = None if layout.prompt is None else row.get(layout.prompt)
    return None if value is None and not layout.needs_prompts else read_prompt(value)


def _examples(prompt: str | Messages, responses: list[Any], row: Row, layout: Layout) -> list[Example]:
    finished = _per_response(row.get(layout.finished) if layout.finished else None, len(responses), layout.many)
    span = row.get(layout.span) if layout.span else None
    if layout.many and _is_pair(span) and len(responses) == 2:
        span = [RowProblem(f"{span} may be a span or two answers: write texts, or a span per response")] * 2
    spans = _per_response(span, len(responses), layout.many and not _is_pair(span))
    examples = []
    for value, reason, part in zip(responses, finished, spans, strict=True):
        try:
            text = _response(value)
        except RowProblem as problem:
            examples.append(Example(problem=str(problem)))
        else:
            ended = True if layout.all_finished else read_finished(reason)
            examples.append(Example(prompt, text, ended, _span(part, text) if layout.span else None))
    return examples


def _count(row: Row, layout: Layout) -> int:
    """The number of responses of a row that can't be read, and thus the length of the lists of its values."""
    responses = row.get(layout.response) if layout.many and layout.response else None
    return len(responses) if _is_list_of_responses(responses) and responses else 1


def _per_response(value: Any, count: int, has_list: bool) -> list[Any]:
    """One value for each of `count` responses: a list of them, or the same for all."""
    if has_list and isinstance(value, list):
        return value[:count] + [None] * (count - len(value))
    return [value] * count


def _exchange(value: Any) -> tuple[Messages, Messages]:
    """A conversation's prompt, and its response."""
    messages = _conversation(value, "the conversation")
    if messages[-1]["role"] != "assistant":
        raise RowProblem(f"the last message is from {messages[-1]['role']!r}, not from 'assistant'")
    if len(messages) == 1:
        raise RowProblem("no message comes before the response")
    return messages[:-1], messages[-1:]


def _responses(value: Any, many: bool) -> list[Any]:
    if isinstance(value, RowProblem):
        raise value
    if value is None:
        raise RowProblem("the response is missing")
    if not many:
        if _shows_many(value):
            raise RowProblem("there is a list of responses, unlike in other rows")
        return [value]
    if not _is_list_of_responses(value):
        raise RowProblem("there is no list of responses, unlike in other rows")
    return value


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
    """True if a response ended by itself, False if it was cut off, by a flag or a reason; None if unknown."""
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


def _from_json(value: Any, column: str) -> Any:
    """A cell of text, read as JSON if it is a text, a list or an object in it; a RowProblem if that is refused."""
    if not isinstance(value, str):
        return value
    try:
        found = parse_json(value)
    except NotTaken as error:
        structured = value.lstrip().startswith(("[", "{"))  # else it is the text "NaN"
        return RowProblem(f"the column {column!r}: {error}") if structured else value
    except ValueError:
        return value
    return found if isinstance(found, str | list | dict) else value  # "42" may be an answer
