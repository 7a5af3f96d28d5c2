"""Finished chunks on disk. Each is one line that is on the disk before the next chunk begins, so whenever a run
stops, what it finished is kept, and a line that was cut off is not taken for a chunk.

The first line says when the run began and what it is made of: its input, its options, its verifiers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from cme.errors import CMEError
from cme.files.atomic import followed, write_text
from cme.files.tables import Malformed


def partial_of(output: Path) -> Path:
    """Where a run keeps what it has finished, until the output is whole."""
    target = followed(output)
    return target.with_name(target.name + ".partial")


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of the input: the added values of each, or why it is no row."""

    rows: list[dict[str, Any] | Malformed]

    def to_json(self) -> list[Any]:
        return [[row.line, row.reason] if isinstance(row, Malformed) else row for row in self.rows]

    @staticmethod
    def from_json(value: list[Any]) -> Chunk:
        return Chunk([Malformed(*row) if isinstance(row, list) else row for row in value])


_HASHES = {
    "sha256": "an input with other contents",
    "prompts_sha256": "other prompts",
    "model_files": "a model with other files",
    "verifier_files": "a verifier with other files",
    "generator_files": "a generator with other files",
    "weights": "an earlier version of cme, which looked at a part of the weights only",
    "weights_sha256": "a verifier with other weights",
    "config": "a verifier with another configuration",
    "rendering": "a verifier with another tokenizer or template",
}


_BEGAN = "began"  # the header's first key, by which a file is known as one of these


class Partial:
    """The file in which a run keeps its finished chunks."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def began(self) -> datetime:
        """When the run began, which all of its sessions take for the present."""
        header = self.header()
        try:
            return datetime.now() if header is None else datetime.fromisoformat(header[_BEGAN])
        except (ValueError, TypeError) as error:
            raise self._damaged() from error

    def header(self) -> dict[str, Any] | None:
        """The first line; None if there is no file. Raises CMEError if it is a file of something else."""
        first = self._first_line()
        return None if first is None else dict(self._parsed(first))

    def check(self, identity: Mapping[str, Any]) -> None:
        """Raise CMEError if the file holds chunks of a run that differs in one of the values of `identity`."""
        found = self.header()
        if found is None:
            return
        for name, value in identity.items():
            if found.get(name) != value:
                difference = _difference(name, found.get(name), value)
                raise CMEError(
                    f"{self.path} is of a run {difference}. "
                    "Continue with what it was started with, or forget it with --overwrite."
                )

    def start(self, header: Mapping[str, Any]) -> int:
        """Ready the file for `append`: a new one, or one whose torn end is cut off. Returns the rows in it."""
        if self.header() is None:
            write_text(self.path, json.dumps({_BEGAN: self.began.isoformat(), **header}) + "\n")
            return 0
        end = sum(len(line) for line in self._whole_raw_lines())
        with self.path.open("r+b") as file:
            file.truncate(end)
        return sum(len(chunk.rows) for chunk in self.chunks())

    def append(self, chunk: Chunk) -> None:
        """Returns once the chunk is on the disk."""
        self._append_line(chunk.to_json())

    def chunks(self) -> Iterator[Chunk]:
        lines = self._whole_lines()
        next(lines, None)
        for value in lines:
            yield Chunk.from_json(value)

    def delete(self) -> None:
        """Raises CMEError if it is a file of something else."""
        if self._first_line() is not None:
            self.path.unlink()

    def _append_line(self, value: Any) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(value).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _first_line(self) -> bytes | None:
        try:
            with self.path.open("rb") as file:
                first = file.readline()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CMEError(f"{self.path} can't be read ({error.strerror}): move it away") from error
        if not first.startswith(f'{{"{_BEGAN}": '.encode()):
            raise CMEError(f"{self.path} is not of an unfinished run: move it away, or name another output")
        return first

    def _whole_raw_lines(self) -> Iterator[bytes]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield line

    def _whole_lines(self) -> Iterator[Any]:
        for line in self._whole_raw_lines():
            yield self._parsed(line)

    def _parsed(self, line: bytes) -> Any:
        try:
            return json.loads(line)
        except ValueError as error:
            raise self._damaged() from error

    def _damaged(self) -> CMEError:
        return CMEError(f"{self.path} is damaged: start anew with --overwrite")


def _difference(name: str, found: Any, value: Any) -> str:
    if isinstance(found, dict) and isinstance(value, dict):
        for key in {**found, **value}:
            if found.get(key) != value.get(key):
                return _difference(key, found.get(key), value.get(key))
    if name in _HASHES:
        return f"of {_HASHES[name]}"
    return f"with {name} = {found!r}, not {value!r}"
