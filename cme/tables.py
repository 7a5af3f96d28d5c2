"""JSONL, CSV and Parquet files, read row by row in a memory that does not grow with them."""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cme.errors import DatasetError

Row = dict[str, Any]

BATCH_ROWS = 1024
"""Rows that are decoded together where a format has batches."""


@dataclass(frozen=True)
class Malformed:
    """A line that holds no row. `line` counts from 1, as editors do."""

    line: int
    reason: str


@dataclass(frozen=True)
class Survey:
    """What one pass over a table finds: the number of rows, malformed ones among them, and every column."""

    rows: int
    columns: tuple[str, ...]


class Table(ABC):
    """A file of rows."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def rows(self) -> Iterator[Row | Malformed]:
        """Every row, in order."""

    @cached_property
    def survey(self) -> Survey:
        """Takes a pass over the file."""
        columns: dict[str, None] = {}
        count = 0
        for row in self.rows():
            count += 1
            if not isinstance(row, Malformed):
                columns.update(dict.fromkeys(row))
        return Survey(count, tuple(columns))

    @cached_property
    def sha256(self) -> str:
        self._seen = self._state()
        return self._digest()

    def check_unchanged(self) -> None:
        """Raise DatasetError if the file has other contents than when `sha256` was first asked for."""
        digest, state = self.sha256, self._state()
        if state != self._seen:
            if self._digest() != digest:
                raise DatasetError(
                    f"{self.path} has been changed since the run began: restore it and run the same command "
                    "again, or start anew with --overwrite"
                )
            self._seen = state

    def _state(self) -> tuple[int, int, int]:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            raise DatasetError(f"{self.path} is gone: restore it and run the same command again") from None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _digest(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


class JsonLines(Table):
    """One JSON object a line; empty lines are no rows."""

    def rows(self) -> Iterator[Row | Malformed]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parse_line(
                        number, (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
                    )


class Csv(Table):
    """A header line, then one record each; every value is a text."""

    def rows(self) -> Iterator[Row | Malformed]:
        csv.field_size_limit(sys.maxsize)
        # Bytes that are not UTF-8 become surrogates, so that they spoil their own row alone
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            while True:
                first = reader.line_num + 1
                try:
                    record = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield Malformed(first, f"not CSV: {error} (to line {reader.line_num})")
                    continue
                if record:
                    yield _parse_record(first, header, record)

    @cached_property
    def survey(self) -> Survey:
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            header = next(csv.reader(file), [])
        for name in header:
            if header.count(name) > 1:
                raise DatasetError(f"{self.path} has two columns called {name!r}")
        return Survey(sum(1 for _ in self.rows()), tuple(header))


class Parquet(Table):
    def rows(self) -> Iterator[Row | Malformed]:
        for batch in self.batches():
            yield from batch.to_pylist()

    def batches(self) -> Iterator[Any]:
        """pyarrow.RecordBatch after RecordBatch, of BATCH_ROWS rows at most."""
        import pyarrow

        try:
            yield from self._file().iter_batches(batch_size=BATCH_ROWS)
        except (pyarrow.ArrowException, OSError) as error:
            raise DatasetError(f"{self.path} can't be read: {error}") from error

    @property
    def schema(self) -> Any:
        """A pyarrow.Schema."""
        return self._file().schema_arrow

    @cached_property
    def survey(self) -> Survey:
        return Survey(self._file().metadata.num_rows, tuple(self.schema.names))

    def _file(self) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(self.path)
        except pyarrow.ArrowInvalid as error:
            raise DatasetError(f"{self.path} is not a Parquet file: {error}") from error


FORMATS: dict[str, type[Table]] = {".jsonl": JsonLines, ".ndjson": JsonLines, ".csv": Csv, ".parquet": Parquet}


def open_table(path: Path) -> Table:
    """The table in `path`. Raises DatasetError if there is none, or if nothing is in it."""
    if not path.is_file():
        raise DatasetError(f"there is no file {str(path)!r}")
    table = FORMATS[format_of(path)](path)
    if path.stat().st_size == 0 or table.survey.rows == 0:
        raise DatasetError(f"{path} is empty: it has no rows")
    first = next(table.rows())
    if not table.survey.columns and isinstance(first, Malformed):
        raise DatasetError(f"no line of {path} can be read; line {first.line}: {first.reason}")
    return table


def format_of(path: Path) -> str:
    """The suffix that names the format. Raises DatasetError if it names none that is known."""
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise DatasetError(
            f"the format of {str(path)!r} is not known: its name must end with {', '.join(FORMATS)}"
        )
    return suffix


def _parse_line(number: int, line: bytes) -> Row | Malformed:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Malformed(number, f"not UTF-8: {error.reason} at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        return Malformed(number, f"not JSON: {error.msg} (character {error.pos + 1})")
    except (RecursionError, ValueError) as error:  # nested too deep, or a number of too many digits
        return Malformed(number, f"not readable: {error}")
    if not isinstance(value, dict):
        return Malformed(number, f"not a JSON object but {type(value).__name__}")
    return value


def _parse_record(number: int, header: list[str], record: list[str]) -> Row | Malformed:
    if len(record) != len(header):
        return Malformed(number, f"{len(record)} fields where the header has {len(header)}")
    try:
        "".join(record).encode()
    except UnicodeEncodeError:
        return Malformed(number, "not UTF-8")
    return dict(zip(header, record, strict=True))
