"""Files of JSON lines that grow. A line counts once it is whole: a kill costs at most the one being written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cme.errors import CMEError
from cme.files.atomic import write_text


class Journal:
    """One JSON value per line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, value: Any) -> None:
        """Returns once the line is on the disk. What a kill left of a line before it is cut off."""
        with self.path.open("ab+") as file:
            file.truncate(_end_of_whole_lines(file))
            file.write(json.dumps(value).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def __iter__(self) -> Iterator[Any]:
        """The values of the whole lines. Raises CMEError if one is damaged, unless it is the last."""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                if line.endswith(b"\n"):
                    yield json.loads(line)
            except (ValueError, RecursionError) as error:
                if number < len(lines):
                    raise CMEError(f"line {number} of {self.path} is damaged ({error}): delete it") from error

    def replace(self, values: Iterable[Any]) -> None:
        """Put these in the place of all lines, at once."""
        write_text(self.path, "".join(json.dumps(value) + "\n" for value in values))


def _end_of_whole_lines(file: BinaryIO) -> int:
    end = file.seek(0, os.SEEK_END)
    while end:
        file.seek(end - 1)
        if file.read(1) == b"\n":
            break
        end -= 1
    return end
