"""Records of CSV with their line numbers, the malformed ones among them.

A stray quote takes every line up to the next quote into its record. Where those lines look like rows, they are
read as rows, and the line with the quote alone is malformed.
"""

from __future__ import annotations

import csv
import sys
from collections import deque
from collections.abc import Iterator
from typing import TextIO

BROKEN_LINES = 10
SUSPECT_LINES = 100
"""A record that is malformed (or sound) and has more lines than this is taken for a stray quote, if its lines look
like rows. Fewer lines may be a text that looks like rows by chance."""

MAX_LINES = 10_000
"""In a record."""


class Records:
    """The records after the header, each with the number of its first line: its fields, or why it has none."""

    def __init__(self, file: TextIO) -> None:
        """`file` must be opened with `newline=""`. Raises ValueError if the header can't be read."""
        csv.field_size_limit(sys.maxsize)
        self._lines = _Lines(file)
        self._reader = csv.reader(self._lines, strict=True)
        header = self._next()
        if isinstance(header, str):
            raise ValueError(header)
        self.header = header or []
        if not _is_unicode(self.header):
            raise ValueError("not UTF-8")

    def __iter__(self) -> Iterator[tuple[int, list[str] | str]]:
        lines = self._lines
        while (record := self._next()) is not None:
            found = self._checked(record)
            count, problem = len(lines.record), found if isinstance(found, str) else None
            if count > (BROKEN_LINES if problem else SUSPECT_LINES) and self._are_rows(lines.record[1:-1]):
                taken = f"a quote here would take {count:,} lines, up to line {lines.last:,}, which look like rows"
                yield lines.first, taken + (f" ({problem})" if problem else "")
                lines.read_again()
            elif problem and count > 1:
                yield lines.first, f"{problem}; its {count:,} lines up to line {lines.last:,} are left out"
            elif found:
                yield lines.first, found

    def _next(self) -> list[str] | str | None:
        """The fields, or what is wrong with them; None at the end."""
        self._lines.begin_record()
        try:
            return next(self._reader)
        except StopIteration:
            return None
        except csv.Error as error:
            return f"not CSV: {error}"

    def _checked(self, record: list[str] | str) -> list[str] | str:
        if isinstance(record, str) or not record:  # an empty line is no row
            return record
        if len(record) != len(self.header):
            return f"{len(record)} fields where the header has {len(self.header)}"
        return record if _is_unicode(record) else "not UTF-8"

    def _are_rows(self, lines: list[str]) -> bool:
        return all(_fields(line) == len(self.header) for line in lines)


class _Lines(Iterator[str]):
    """The lines of a file; those of one record can be read again.

    Attributes:
        record: its lines.
        first: the number of the first of them.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._again: deque[str] = deque()
        self.record: list[str] = []
        self.first = 1

    def __next__(self) -> str:
        if len(self.record) == MAX_LINES:
            raise csv.Error(f"a record of more than {MAX_LINES:,} lines")
        self.record.append(self._again.popleft() if self._again else next(self._file))
        return self.record[-1]

    @property
    def last(self) -> int:
        return self.first + len(self.record) - 1

    def begin_record(self) -> None:
        self.first += len(self.record)
        self.record = []

    def read_again(self) -> None:
        """All but the first line of the record."""
        self._again.extendleft(reversed(self.record[1:]))
        del self.record[1:]


def _fields(line: str) -> int | None:
    """How many a line has by itself; None if it is no record."""
    try:
        return len(next(csv.reader([line], strict=True), []))
    except csv.Error:
        return None


def _is_unicode(fields: list[str]) -> bool:
    """Bytes that are not UTF-8 have become surrogates."""
    try:
        "".join(fields).encode()
    except UnicodeEncodeError:
        return False
    return True
