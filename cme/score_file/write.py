"""The input's rows with the added columns -> the output, in the format that its name says."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from datetime import date, datetime, time
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from cme.errors import DatasetError
from cme.files.atomic import replacing
from cme.files.compression import writing_text
from cme.files.strict_json import finite
from cme.files.tables import BATCH_BYTES, BATCH_ROWS, STANDARD, Malformed, Parquet, Row, Table, format_of
from cme.score_file.columns import AddedColumns

Added = dict[str, Any] | Malformed


class Output:
    """Writes the output of one run.

    Making it finds out whether the format can hold the rows, which is worth knowing before they are scored.
    """

    def __init__(self, table: Table, path: Path, columns: AddedColumns) -> None:
        """Raises DatasetError if Parquet can't hold the input's columns."""
        self.table = table
        self.path = path
        self.columns = columns
        self._format = ".jsonl" if path == STANDARD else format_of(path)
        if self._format == ".parquet":
            self._schema = _input_schema(table)
            self._added_schema = _added_schema(columns)

    def write(self, added: Iterable[Added]) -> None:
        """Write the file whole or not at all. `added` has one item for every row of the table, in order."""
        if self._format == ".parquet":
            with replacing(self.path) as temporary:
                self._write_parquet(temporary, added)
        else:
            with writing_text(self.path) as file:
                self.write_to(file, added)

    def write_to(self, file: TextIO, added: Iterable[Added]) -> None:
        """Write text as it comes: the rows of CSV, or JSON lines."""
        rows = self._rows(added)
        if self._format == ".csv":
            names = [*self.table.survey.columns, *self.columns.kinds]
            writer = csv.writer(_LineFeeds(file))
            writer.writerow(names)
            writer.writerows([_cell(row.get(name)) for name in names] for row in rows)
        else:
            file.writelines(to_json(row) + "\n" for row in rows)

    def _rows(self, added: Iterable[Added]) -> Iterator[Row]:
        for row, values in zip(self.table.rows(), added, strict=True):
            if not isinstance(row, Malformed):
                assert not isinstance(values, Malformed)
                yield {**row, **values}

    def _write_parquet(self, path: Path, added: Iterable[Added]) -> None:
        import pyarrow
        import pyarrow.parquet

        source = iter(added)
        # Without the metadata in which other libraries describe the columns that they wrote
        schema = pyarrow.schema([*self._schema, *self._added_schema])
        with pyarrow.parquet.ParquetWriter(path, schema) as writer:
            for columns, count in self._input_batches():
                values = list(islice(source, count))
                rows = [value for value in values if not isinstance(value, Malformed)]
                new = [pyarrow.array([row[f.name] for row in rows], f.type) for f in self._added_schema]
                writer.write_batch(pyarrow.record_batch([*columns, *new], schema=schema))

    def _input_batches(self) -> Iterator[tuple[list[Any], int]]:
        """Columns of consecutive rows, and how many rows, malformed ones among them, they come from."""
        if isinstance(self.table, Parquet):
            for batch in self.table.batches():
                yield batch.columns, batch.num_rows
            return
        for batch in _batched(self.table.rows()):
            rows = [row for row in batch if not isinstance(row, Malformed)]
            yield [_array(rows, f.name, f.type, self.table) for f in self._schema], len(batch)


class _LineFeeds:
    """Ends the rows of a csv.writer, which quotes a lone CR because it ends them with CRLF, with LF."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, row: str) -> None:
        self._file.write(row.removesuffix("\r\n") + "\n")


def malformed_of(output: Path) -> Path:
    """The file that lists the malformed lines of the input, if there are any."""
    return output.with_name(output.name + ".malformed.jsonl")


def write_malformed(path: Path, lines: Iterable[Malformed]) -> None:
    with writing_text(path) as file:
        file.writelines(to_json({"line": line.line, "reason": line.reason}) + "\n" for line in lines)


def to_json(value: Any) -> str:
    """The value in one line of JSON. NaN and infinities, which Parquet knows and JSON doesn't, are null."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError:
        value = finite(value)
        text = json.dumps(value, ensure_ascii=False, default=_plain)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON's escapes can hold and UTF-8 can't
        return json.dumps(value, default=_plain)
    return text


def _plain(value: Any) -> str:
    # Parquet knows dates, decimals and bytes
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    return value.hex() if isinstance(value, bytes) else str(value)


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return to_json(value) if isinstance(value, list | dict) else _plain(value)


def _input_schema(table: Table) -> Any:
    """A pyarrow.Schema that holds every row. Raises DatasetError if there is none."""
    import pyarrow
    import pyarrow.parquet

    if isinstance(table, Parquet):
        return table.schema
    schema = pyarrow.schema([])
    sink = pyarrow.BufferOutputStream()
    try:
        for batch in _batched(table.rows()):
            rows = [row for row in batch if not isinstance(row, Malformed)]
            arrays = ((name, _array(rows, name, None, table).type) for name in table.survey.columns)
            schema = pyarrow.unify_schemas([schema, pyarrow.schema(arrays)], promote_options="permissive")
        with pyarrow.parquet.ParquetWriter(sink, schema):
            pass
        pyarrow.parquet.read_schema(pyarrow.BufferReader(sink.getvalue()))  # which may be too deep to be read
    except (pyarrow.ArrowException, OSError, UnicodeEncodeError) as error:
        raise _does_not_fit(table, str(error)) from error
    return schema


def _added_schema(columns: AddedColumns) -> Any:
    import pyarrow

    token = {"id": "int64", "text": "string", "start": "int64", "end": "int64"}
    token |= {"logprob": "float64", "entropy": "float64", "top1": "bool"}
    types = {
        "number": pyarrow.float64(),
        "count": pyarrow.int64(),
        "flag": pyarrow.bool_(),
        "text": pyarrow.string(),
        "tokens": pyarrow.list_(pyarrow.struct([(k, pyarrow.type_for_alias(v)) for k, v in token.items()])),
    }
    fields = ((name, types[kind]) for name, kind in columns.kinds.items())
    return pyarrow.schema([(name, pyarrow.list_(type_) if columns.many else type_) for name, type_ in fields])


def _array(rows: list[Row], name: str, type_: Any, table: Table) -> Any:
    import pyarrow

    try:
        return pyarrow.array([row.get(name) for row in rows], type_)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError, UnicodeEncodeError) as error:
        raise _does_not_fit(table, f"column {name!r}: {error}") from error


def _does_not_fit(table: Table, why: str) -> DatasetError:
    return DatasetError(f"the columns of {table.name} do not fit into Parquet ({why}): name an output in .jsonl")


def _batched(rows: Iterator[Row | Malformed]) -> Iterator[list[Row | Malformed]]:
    batch: list[Row | Malformed] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += 0 if isinstance(row, Malformed) else _size(row)
        if len(batch) == BATCH_ROWS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _size(value: Any) -> int:
    """Roughly, in bytes."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 8
