"""The folder of an evaluation, which one run at a time writes to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cme.errors import CMEError
from cme.files.atomic import locked

LOCK = ".cme-lock"


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Make `folder`, and keep other runs out of it. Raises CMEError if one is in it, or it can't be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CMEError(f"can't write to {str(folder)!r}: {error.strerror or error}") from error
    with locked(folder, folder / LOCK):
        yield
