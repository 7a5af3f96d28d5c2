"""A journal of the finished rows of a run, which a run with the same input, options and models continues.

The first line says when the run began and what it is made of; each other line is a list of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from cme.errors import CMEError
from cme.files.atomic import followed
from cme.files.journal import Journal


def partial_of(output: Path) -> Path:
    """The file that keeps the finished rows of a run, until the output is whole."""
    target = followed(output)
    return target.with_name(target.name + ".partial")


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
_REMEDY = "delete it to start anew"


class Partial:
    """The file in which a run keeps its finished rows, which are JSON values."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._journal = Journal(path, _REMEDY)

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
        if not self._exists():
            return None
        first = next(iter(self._journal), None)
        if not isinstance(first, dict):
            raise self._damaged()
        return first

    def check(self, identity: Mapping[str, Any]) -> None:
        """Raise CMEError if the file is of a run that differs in one of the values of `identity`."""
        if (found := self.header()) is None:
            return
        for name, value in identity.items():
            if found.get(name) != value:
                raise CMEError(
                    f"{self.path} is of a run {_difference(name, found.get(name), value)}. "
                    "Continue with what it was started with, or forget it with --overwrite."
                )

    def start(self, header: Mapping[str, Any]) -> int:
        """Ready the file for `append`, which may exist. Returns the number of rows in it."""
        if self.header() is None:
            self._journal.replace([{_BEGAN: self.began.isoformat(), **header}])
        return sum(1 for _ in self.rows())

    def append(self, rows: Sequence[Any]) -> None:
        """Returns once all of the rows are on the disk; an interruption keeps all or none."""
        self._journal.append(rows)

    def rows(self) -> Iterator[Any]:
        """Raises CMEError if a line is damaged."""
        for line in islice(self._journal, 1, None):
            if not isinstance(line, list):
                raise self._damaged()
            yield from line

    def delete(self) -> None:
        """Raises CMEError if it is a file of something else."""
        if self._exists():
            self.path.unlink()

    def _exists(self) -> bool:
        """Raises CMEError if it is a file of something else."""
        start = f'{{"{_BEGAN}": '.encode()
        try:
            with self.path.open("rb") as file:
                is_ours = file.read(len(start)) == start
        except FileNotFoundError:
            return False
        except OSError as error:
            raise CMEError(f"{self.path} can't be read ({error.strerror}): move it away") from error
        if not is_ours:
            raise CMEError(f"{self.path} is not of an unfinished run: move it away, or name another output")
        return True

    def _damaged(self) -> CMEError:
        return CMEError(f"{self.path} is damaged: {_REMEDY}")


def _difference(name: str, found: Any, value: Any) -> str:
    if isinstance(found, dict) and isinstance(value, dict):
        for key in {**found, **value}:
            if found.get(key) != value.get(key):
                return _difference(key, found.get(key), value.get(key))
    if name in _HASHES:
        return f"of {_HASHES[name]}"
    return f"with {name} = {found!r}, not {value!r}"
