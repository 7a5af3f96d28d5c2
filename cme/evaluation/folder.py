"""The folder of an evaluation, which one run at a time writes to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from cme.errors import CMEError


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Make `folder`, and keep other runs out of it. Raises CMEError if one is in it, or it can't be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise CMEError(f"another process is writing to {folder}: wait for it, or name another folder") from None
    except OSError as error:
        raise CMEError(f"can't write to {str(folder)!r}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()
