"""JSON lines, JSON, CSV and Parquet files, read row by row in a memory that does not grow with them."""

from __future__ import annotations

import codecs
import io
import shutil
import sys
import tempfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cme.errors import DatasetError
from cme.files.atomic import sha256
from cme.files.compression import COMPRESSIONS, reading
from cme.files.csv_records import CsvRecords
from cme.files.lm_eval import FIELDS, read_samples
from cme.files.strict_json import parse_json, why

Row = dict[str, Any]

BATCH_ROWS = 1024
"""Most rows that are decoded together where a format has batches."""

BATCH_BYTES = 2**23
"""About how much of them, however few rows that is."""

READ_BYTES = 2**20
"""Read at once of each column of Parquet, which would otherwise be a whole row group."""

STANDARD = Path("-")
"""Standard input and standard output, as command lines name them: JSON lines."""


@dataclass(frozen=True)
class Malformed:
    """A line that holds no row. `line` counts from 1, as editors do."""

    line: int
    reason: str


@dataclass(frozen=True)
class Survey:
    """The findings of one pass over a table.

    Attributes:
        rows: how many, malformed ones among them.
        malformed: how many of them are malformed.
        columns: every one.
    """

    rows: int
    malformed: int
    columns: tuple[str, ...]

    @staticmethod
    def of(rows: Iterable[Row | Malformed], columns: Iterable[str] = ()) -> Survey:
        """With `columns` before those of the rows."""
        seen = dict.fromkeys(columns)
        count = malformed = 0
        for row in rows:
            count += 1
            if isinstance(row, Malformed):
                malformed += 1
            else:
                seen.update(dict.fromkeys(row))
        return Survey(count, malformed, tuple(seen))


class Table(ABC):
    """A file of rows. `name` is what messages call it."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.name = name or str(path)

    @abstractmethod
    def rows(self) -> Iterator[Row | Malformed]:
        """Every row, in order."""

    @cached_property
    def survey(self) -> Survey:
        """Takes a pass over the file."""
        return Survey.of(self.rows())

    @cached_property
    def sha256(self) -> str:
        self._seen = self._state()
        return sha256(self.path)

    def check_unchanged(self) -> None:
        """Raise DatasetError if the file has other contents than when `sha256` was first asked for."""
        digest, state = self.sha256, self._state()
        if state != self._seen:
            if sha256(self.path) != digest:
                raise DatasetError(
                    f"{self.name} has been changed since the run began: restore it and run the same command "
                    "again, or start anew with --overwrite"
                )
            self._seen = state

    def _state(self) -> tuple[int, int, int]:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            raise DatasetError(f"{self.path} is gone: restore it and run the same command again") from None
        return found.st_ino, found.st_size, found.st_mtime_ns


class JsonLines(Table):
    """One JSON object per line; empty lines are no rows."""

    def rows(self) -> Iterator[Row | Malformed]:
        with reading(self.path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parse_line(
                        number, (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
                    )


class StandardInput(JsonLines):
    """JSON lines that come once, and are read several times from a temporary file, deleted with this object."""

    def __init__(self) -> None:
        """Raises DatasetError if there is no standard input."""
        if sys.stdin is None:
            raise DatasetError("standard input is closed: give a file, or write rows to it")
        self._copy = tempfile.NamedTemporaryFile(prefix="cme-", suffix=".jsonl")  # noqa: SIM115
        shutil.copyfileobj(sys.stdin.buffer, self._copy)
        self._copy.flush()
        super().__init__(Path(self._copy.name), "standard input")


class Samples(Table):
    """A sample file of lm-evaluation-harness, as `read_samples` reads it."""

    def __init__(self, lines: JsonLines) -> None:
        super().__init__(lines.path, lines.name)
        self._lines = lines

    def rows(self) -> Iterator[Row | Malformed]:
        return read_samples(self._lines.rows(), self.name)


class Json(Table):
    """A JSON list of objects, which is read whole."""

    def rows(self) -> Iterator[Row | Malformed]:
        try:
            with reading(self.path) as file:
                values = parse_json(file.read().decode("utf-8-sig"))
        except ValueError as error:
            raise DatasetError(f"{self.path} can't be read: {why(error)}") from error
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise DatasetError(
                f"{self.path} is not a JSON list of objects; a file with one object per line ends with .jsonl"
            )
        yield from values


class Csv(Table):
    """A header, then one record each; every value is a text."""

    def rows(self) -> Iterator[Row | Malformed]:
        with self._records() as records:
            for line, found in records:
                if isinstance(found, str):
                    yield Malformed(line, found)
                else:
                    yield dict(zip(records.header, found, strict=True))

    @cached_property
    def survey(self) -> Survey:
        with self._records() as records:
            header = records.header
        return Survey.of(self.rows(), header)

    @contextmanager
    def _records(self) -> Iterator[CsvRecords]:
        with reading(self.path) as file:
            try:
                # Bytes that are not UTF-8 become surrogates, so that they spoil their own row alone
                records = CsvRecords(io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline=""))
            except ValueError as error:
                raise DatasetError(f"the header of {self.path} can't be read: {error}") from error
            _check_unique(records.header, self.path)
            yield records


class Parquet(Table):
    """Reading raises DatasetError, which names the column, if the file is damaged or holds what Python can't."""

    def rows(self) -> Iterator[Row | Malformed]:
        names = self.schema.names
        for group, batch in self._batches():
            columns = [self._values(group, *column) for column in zip(names, batch.columns, strict=True)]
            yield from (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True))

    def batches(self) -> Iterator[Any]:
        """pyarrow.RecordBatch after RecordBatch, of BATCH_ROWS rows and about BATCH_BYTES at most."""
        return (batch for _, batch in self._batches())

    @cached_property
    def schema(self) -> Any:
        """A pyarrow.Schema."""
        return self._open().schema_arrow

    @cached_property
    def survey(self) -> Survey:
        _check_unique(self.schema.names, self.path)
        return Survey.of(self.rows(), self.schema.names)

    def _batches(self) -> Iterator[tuple[int, Any]]:
        """With the number of the row group that each is from."""
        file, rows = self._open(), 0
        for group in range(file.num_row_groups):
            try:
                for batch in file.iter_batches(_rows_at_once(file.metadata.row_group(group)), [group]):
                    rows += batch.num_rows
                    yield group, batch
            except Exception as error:  # of many types
                raise self._unreadable(group, _bad_column(file, group), error) from error
        if rows != file.metadata.num_rows:
            raise DatasetError(f"{self.path} is damaged: it says {file.metadata.num_rows:,} rows and has {rows:,}")

    def _values(self, group: int, name: str, column: Any) -> list[Any]:
        try:
            values: list[Any] = column.to_pylist()
        except Exception as error:  # a far date, an unknown time zone, a text that is not UTF-8
            raise self._unreadable(group, name, error) from error
        return values

    def _open(self) -> Any:
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(
                self.path, pre_buffer=False, buffer_size=READ_BYTES, page_checksum_verification=True
            )
            _ = file.schema_arrow.names
        except Exception as error:
            raise DatasetError(f"{self.path} is not a Parquet file: {error}") from error
        return file

    def _unreadable(self, group: int, column: str | None, error: Exception) -> DatasetError:
        where = f"row group {group}" if column is None else f"the column {column!r} in row group {group}"
        return DatasetError(f"{where} of {self.path} can't be read: {type(error).__name__}: {error}")


def _rows_at_once(group: Any) -> int:
    """From a pyarrow.parquet.RowGroupMetaData."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)))


def _bad_column(file: Any, group: int) -> str | None:
    for name in file.schema_arrow.names:
        try:
            file.read_row_group(group, columns=[name])
        except Exception:
            return str(name)
    return None


FORMATS: dict[str, type[Table]] = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".json": Json,
    ".csv": Csv,
    ".parquet": Parquet,
}
"""The formats that are read, by suffix."""

OUTPUT_FORMATS = tuple(suffix for suffix, kind in FORMATS.items() if kind is not Json)
"""The formats that are written: those whose rows need not all be in memory."""


def is_table(name: str | Path) -> bool:
    """True if a name is that of a file of rows, by its suffix."""
    return _suffix(Path(name)) in FORMATS


def format_of(path: Path, formats: Collection[str] = FORMATS) -> str:
    """The suffix that names the format, without that of a compression.

    Raises DatasetError if it is none of `formats`.
    """
    suffix = _suffix(path)
    if suffix not in formats:
        raise DatasetError(
            f"the format of {str(path)!r} is not known: its name must end with {', '.join(formats)}, or with "
            f"{' or '.join(COMPRESSIONS)} after one of these but .parquet"
        )
    return suffix


def _suffix(path: Path) -> str:
    suffix, before = path.suffix.lower(), path.with_suffix("").suffix.lower() if path.suffix else ""
    return before if suffix in COMPRESSIONS and before in FORMATS and before != ".parquet" else suffix


def open_table(path: Path) -> Table:
    """The table in `path`, or in standard input. Raises DatasetError if there is none, or if nothing is in it."""
    if path == STANDARD:
        table: Table = StandardInput()
    elif path.is_file():
        table = FORMATS[format_of(path)](path)
    else:
        raise DatasetError(f"there is no file {str(path)!r}")
    if table.path.stat().st_size == 0 or table.survey.rows == 0:
        raise DatasetError(f"{table.name} is empty: it has no rows")
    if isinstance(table, JsonLines) and set(table.survey.columns) >= FIELDS:
        return Samples(table)
    if not table.survey.columns and isinstance(first := next(table.rows()), Malformed):
        raise DatasetError(f"no line of {table.name} can be read; line {first.line}: {first.reason}")
    return table


def _parse_line(number: int, line: bytes) -> Row | Malformed:
    try:
        value = parse_json(line.decode())
    except ValueError as error:
        return Malformed(number, why(error))
    if not isinstance(value, dict):
        return Malformed(number, f"not a JSON object but {type(value).__name__}")
    return value


def _check_unique(columns: Sequence[str], path: Path) -> None:
    for name, count in Counter(columns).items():
        if count > 1:
            raise DatasetError(f"{path} has two columns called {name!r}")
