"""Files that are compressed where their names end with .gz or .zst."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, TextIO

from cme.errors import DatasetError
from cme.files.atomic import replacing

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""By suffix, as pyarrow calls them."""

_READ_BYTES = 2**20


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed. Raises DatasetError, while they are read, if they are broken or cut off."""
    if (compression := _compression(path)) is None:
        with path.open("rb") as file:
            yield file
        return
    import pyarrow

    try:
        with pyarrow.input_stream(str(path), compression=compression) as stream:
            yield io.BufferedReader(stream, _READ_BYTES)
    except OSError as error:
        raise DatasetError(
            f"{path} can't be decompressed: it is broken, cut off, or no {compression} file ({error}). "
            "Copy or make it again"
        ) from error


@contextmanager
def writing_text(path: Path) -> Iterator[TextIO]:
    """A text file that takes the place of `path` once it is whole.

    It is in UTF-8; what that can't express, which are lone surrogates, is written as escapes.
    """
    with (
        replacing(path) as temporary,
        _binary(temporary, _compression(path)) as raw,
        io.TextIOWrapper(raw, "utf-8", "backslashreplace", newline="") as file,
    ):
        yield file


def _binary(path: Path, compression: str | None) -> IO[Any]:
    if compression is None:
        return path.open("wb")
    import pyarrow

    stream: IO[Any] = pyarrow.output_stream(str(path), compression=compression)
    return stream


def _compression(path: Path) -> str | None:
    return COMPRESSIONS.get(path.suffix.lower())
