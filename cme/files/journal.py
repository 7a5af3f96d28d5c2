"""Files of JSON lines that grow. A line counts once it is whole: a kill costs at most the one being written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cme.errors import CMEError
from cme.files.atomic import write_text

_BLOCK = 2**16  # bytes that are searched at once for the end of the last whole line


class Journal:
    """One JSON value per line."""

    def __init__(self, path: Path, remedy: str = "delete it") -> None:
        """`remedy` is what the user is told to do about a damaged line."""
        self.path = path
        self.remedy = remedy

    def append(self, value: Any) -> None:
        """Returns once the line is on the disk. What a kill left of a line before it is cut off."""
        with self.path.open("ab+") as file:
            file.truncate(_end_of_whole_lines(file))
            file.write(json.dumps(value).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def __iter__(self) -> Iterator[Any]:
        """The values of the whole lines; none if there is no file. Raises CMEError if one of them is damaged."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    yield self._parsed(line, number)

    def replace(self, values: Iterable[Any]) -> None:
        """Put these in the place of all lines, at once."""
        write_text(self.path, "".join(json.dumps(value) + "\n" for value in values))

    def _parsed(self, line: bytes, number: int) -> Any:
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CMEError(f"line {number} of {self.path} is damaged ({error}): {self.remedy}") from error


def _end_of_whole_lines(file: BinaryIO) -> int:
    end = file.seek(0, os.SEEK_END)
    while end:
        start = file.seek(max(0, end - _BLOCK))
        if newline := file.read(end - start).rfind(b"\n") + 1:
            return start + newline
        end = start
    return 0
