"""Records of CSV with their line numbers, the malformed ones among them.

A sound record is a row, whatever its lines look like. A stray quote takes every line up to the next quote into
its record: where that makes it malformed and those lines are rows by themselves, only the first line is lost.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from typing import Any, TextIO

STRAY_LINES = 10
"""A malformed record is taken for a stray quote if it has at least as many lines between its ends, and nearly all
of them are rows. Fewer may be a text that looks like rows by chance."""

STRAY_ROWS = 0.9
"""The least share of them that are rows; empty lines do not count."""

Record = list[str] | str
"""Its fields, none of which an empty line has, or why it is malformed."""


class CsvRecords:
    """The records after the header, each with the number of its first line."""

    def __init__(self, file: TextIO) -> None:
        """`file` must be opened with `newline=""`. Raises ValueError if the header can't be read."""
        csv.field_size_limit(sys.maxsize)
        self._lines = _Lines(file)
        self._reader = csv.reader(self._lines, strict=True)
        try:
            self.header: list[str] = next(self._reader, [])
        except csv.Error as error:
            raise ValueError(f"not CSV: {error}") from error
        if not _is_unicode(self.header):
            raise ValueError("not UTF-8")

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        lines = self._lines
        lines.begin_record()
        while (record := self._next(self._reader)) is not None:
            if isinstance(record, str) and self._are_rows(lines.record[1:-1]):
                yield from self._apart(record)
            elif record:
                found = _in_unicode(record)
                if isinstance(found, str) and len(lines.record) > 1:
                    found += f"; its {len(lines.record):,} lines up to line {lines.last:,} are left out"
                yield lines.first, found
            lines.begin_record()

    def _apart(self, problem: str) -> Iterator[tuple[int, Record]]:
        """The lines of a malformed record, each by itself but for the last, where another record may begin."""
        lines = self._lines
        taken = f"{len(lines.record):,} lines, up to line {lines.last:,}, which look like rows"
        yield lines.first, f"a quote here would take {taken} ({problem})"
        for number, line in enumerate(lines.record[1:-1], lines.first + 1):
            if record := self._alone(line):
                yield number, _in_unicode(record)
        lines.read_last_again()

    def _are_rows(self, lines: list[str]) -> bool:
        found = [isinstance(record, list) for line in lines if (record := self._alone(line))]
        return len(lines) >= STRAY_LINES and sum(found) >= STRAY_ROWS * len(found) > 0

    def _alone(self, line: str) -> Record:
        return self._next(csv.reader([line], strict=True)) or []

    def _next(self, reader: Any) -> Record | None:
        """None at the end. `reader` is a csv.reader."""
        try:
            fields: list[str] = next(reader)
        except StopIteration:
            return None
        except csv.Error as error:
            return f"not CSV: {error}"
        if fields and len(fields) != len(self.header):
            return f"{len(fields)} fields where the header has {len(self.header)}"
        return fields


class _Lines(Iterator[str]):
    """The lines of a file, of which the last can be read again.

    Attributes:
        record: those of one record.
        first: the number of the first of them.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._again: list[str] = []
        self.record: list[str] = []
        self.first = 1

    def __next__(self) -> str:
        self.record.append(self._again.pop() if self._again else next(self._file))
        return self.record[-1]

    @property
    def last(self) -> int:
        return self.first + len(self.record) - 1

    def begin_record(self) -> None:
        self.first += len(self.record)
        self.record = []

    def read_last_again(self) -> None:
        self._again.append(self.record.pop())


def _in_unicode(record: Record) -> Record:
    return record if isinstance(record, str) or _is_unicode(record) else "not UTF-8"


def _is_unicode(fields: list[str]) -> bool:
    """Bytes that are not UTF-8 have become surrogates."""
    try:
        "".join(fields).encode()
    except UnicodeEncodeError:
        return False
    return True
