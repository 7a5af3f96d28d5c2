"""Responses, and files of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cme.errors import DatasetError
from cme.files.records import read_finished
from cme.files.tables import FORMATS
from cme.tasks.registry import is_task
from cme.text.rendering import text_of
from cme.train.data import load_prompts

_RESPONSE_COLUMNS = ("response", "responses", "completion", "completions", "output")


@dataclass(frozen=True)
class Response:
    """
    Attributes:
        prompt: its text.
        tokens: of the model, the end of the turn included; None for a file.
        finished: ended by itself; None if nobody knows.
    """

    prompt: str
    text: str
    tokens: int | None = None
    finished: bool | None = None


def is_file(name: str) -> bool:
    """Whether a side is a file of responses, not a model."""
    return Path(name).suffix.lower() in FORMATS


def load_rows(name: str, limit: int | None) -> list[dict[str, Any]]:
    """Rows with a `prompt`: a task's held-out questions, a file's, or a hub data set's `train` split."""
    prompts = load_prompts(name, test_split="test" if is_task(name) else None)
    data = prompts.train if prompts.held_out is None else prompts.held_out
    return list(data.select(range(min(limit or len(data), len(data)))))


def read_file(name: str) -> list[Response]:
    """Raises DatasetError if the file can't be read or has no column of responses."""
    responses = []
    for row in load_rows(name, None):
        column = next((c for c in _RESPONSE_COLUMNS if row.get(c) is not None), None)
        if column is None:
            raise DatasetError(f"{name!r} has a row without a response: it needs one of {_RESPONSE_COLUMNS}")
        value = row[column]
        several = isinstance(value, list) and not (value and isinstance(value[0], Mapping))
        texts = value if several else [value]
        finished = read_finished(row.get("finished", row.get("finish_reason")))
        responses += [Response(text_of(row["prompt"]), text_of(text), finished=finished) for text in texts]
    return responses
