"""Files of prompts and of responses, and which response belongs to which prompt."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cme.errors import DatasetError
from cme.files.tables import FORMATS, Malformed, open_table
from cme.text.rendering import Messages, text_of

_PROMPT = ("prompt", "instruction")
_RESPONSE = ("response", "output", "completion")


@dataclass(frozen=True)
class Prompt:
    """Attributes:
    id: from the file; where files have none, the text.
    dataset: the part of a collection that it is from, as in AlpacaEval's files.
    """

    id: str
    prompt: str | Messages
    dataset: str | None = None


@dataclass(frozen=True)
class Row:
    """A row of a file, each field None if the file does not have it."""

    id: str | None
    prompt: str | Messages | None
    response: str | None
    dataset: str | None
    generator: str | None
    where: str


@dataclass(frozen=True)
class Source:
    """The rows of a file."""

    path: Path
    rows: tuple[Row, ...]

    @property
    def has_ids(self) -> bool:
        return all(row.id is not None for row in self.rows)

    @property
    def generator(self) -> str | None:
        """Who wrote the responses, if the file says that one did."""
        names = {row.generator for row in self.rows}
        return names.pop() if len(names) == 1 else None


def is_file(name: str) -> bool:
    """Whether a command line's word means a file of responses, not a model."""
    return Path(name).suffix.lower() in FORMATS


def read(path: Path) -> Source:
    """Read .jsonl, .csv, .parquet, or a .json list as AlpacaEval writes it.

    Raises DatasetError, which says what is wrong with which row.
    """
    rows = tuple(_row(value, f"{where} of {path}") for where, value in _values(path))
    if not rows:
        raise DatasetError(f"{path} is empty: it has no rows")
    return Source(path, rows)


def prompts_of(source: Source, by_id: bool) -> list[Prompt]:
    """The prompts, in order. Raises DatasetError if one is missing, empty or there twice."""
    _by_key(source, by_id)
    prompts = []
    for row in source.rows:
        if row.prompt is None or not text_of(row.prompt).strip():
            raise DatasetError(
                f"{row.where} has no prompt: a row needs one, in a column called {' or '.join(_PROMPT)}"
            )
        prompts.append(Prompt(_key(row, by_id), row.prompt, row.dataset))
    return prompts


def responses_to(prompts: Sequence[Prompt], source: Source, by_id: bool) -> dict[str, str]:
    """The responses of a file by the prompts' ids; prompts without one are left out.

    Raises DatasetError if two rows answer the same prompt, or if an id stands for another prompt in this file.
    """
    rows = _by_key(source, by_id)
    found: dict[str, str] = {}
    for prompt in prompts:
        row = rows.get(prompt.id)
        if row is None:
            continue
        if row.prompt is not None and _text(row.prompt) != _text(prompt.prompt):
            raise DatasetError(
                f"{row.where} has another prompt under the id {prompt.id!r}: {text_of(row.prompt)[:80]!r}, "
                f"not {text_of(prompt.prompt)[:80]!r}. The files must be about the same prompts."
            )
        if row.response is None:
            raise DatasetError(
                f"{row.where} has no response: a row needs one text, in a column called "
                f"{', '.join(_RESPONSE[:-1])} or {_RESPONSE[-1]} (an empty response is an empty text)"
            )
        found[prompt.id] = row.response
    return found


def _by_key(source: Source, by_id: bool) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for row in source.rows:
        key = _key(row, by_id)
        if key in rows:
            what = f"id {key!r}" if by_id else f"prompt {key[:80]!r}"
            raise DatasetError(
                f"{source.path} has the {what} twice: {rows[key].where.split(' of ')[0]} and "
                f"{row.where.split(' of ')[0]}. Keep one of them{'' if by_id else ', or give the rows ids'}."
            )
        rows[key] = row
    return rows


def _key(row: Row, by_id: bool) -> str:
    if by_id:
        return str(row.id)
    if row.prompt is None:
        raise DatasetError(
            f"{row.where} has no prompt, and not every row of all files has an id: give every row a prompt"
        )
    return _text(row.prompt)


def _text(prompt: str | Messages) -> str:
    return text_of(prompt).strip()


def _values(path: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    if path.suffix.lower() == ".json":
        yield from ((f"entry {n}", value) for n, value in enumerate(read_list(path), 1))
        return
    for n, row in enumerate(open_table(path).rows(), 1):
        if isinstance(row, Malformed):
            raise DatasetError(f"line {row.line} of {path} can't be read: {row.reason}")
        yield f"row {n}", row


def read_list(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON list. Raises DatasetError if the file is something else."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise DatasetError(f"could not read {str(path)!r}: {reason}") from error
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise DatasetError(f"{path} is not a JSON list of objects; a file with one object a line ends with .jsonl")
    return values


def _row(value: Mapping[str, Any], where: str) -> Row:
    prompt = _first(value, _PROMPT)
    if prompt is not None and not isinstance(prompt, str) and not _is_conversation(prompt):
        raise DatasetError(f"{where} has a prompt that is neither a text nor a list of messages: {prompt!r:.80}")
    response = _first(value, _RESPONSE)
    if _is_conversation(response):
        response = text_of(response)
    if response is not None and not isinstance(response, str):
        raise DatasetError(f"{where} has a response that is not one text: {response!r:.80}")
    return Row(
        id=None if value.get("id") is None else str(value["id"]),
        prompt=prompt,
        response=response,
        dataset=value.get("dataset"),
        generator=value.get("generator"),
        where=where,
    )


def _first(value: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((value[name] for name in names if value.get(name) is not None), None)


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)
