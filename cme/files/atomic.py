"""Files that are there whole or not at all, and that one process at a time writes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cme.errors import CMEError


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def followed(path: Path) -> Path:
    """The file that `path` is, or that it leads to as a symbolic link, whether it exists or not.

    Raises CMEError if it leads to itself.
    """
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise CMEError(
            f"{str(path)!r} is a symbolic link that leads back to itself: delete it, or name another file"
        )
    return target


def beside(path: Path, purpose: str) -> Path:
    """A file of ours next to the one that `path` leads to, with a name that no user gives a file."""
    target = followed(path)
    return target.with_name(f".{target.name}.cme-{purpose}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` once all is in it and on the disk.

    Where `path` is a symbolic link, it stays one, and the file that it leads to is replaced.
    """
    temporary = beside(path, "tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, followed(path))
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(output: Path, lock_file: Path) -> Iterator[None]:
    """Keep other processes out of `output`. Raises CMEError if one is in it, or `lock_file` can't be written."""
    from filelock import FileLock, Timeout  # brings asyncio, which no help text needs

    lock = FileLock(lock_file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise CMEError(f"another process is writing {output}: wait for it, or give another name") from None
    except OSError as error:
        raise CMEError(f"can't write to {str(lock_file.parent)!r}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock_file.unlink(missing_ok=True)  # while it is held: who opened it meanwhile sees that the name is gone
        lock.release()


LOCK = ".cme-lock"
"""In a folder that one run at a time writes to."""


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Make `folder`, and keep other runs out of it. Raises CMEError if one is in it, or it can't be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CMEError(f"can't write to {str(folder)!r}: {error.strerror or error}") from error
    with locked(folder, folder / LOCK):
        yield


def write_text(path: Path, text: str) -> None:
    """Replace a file with a text, in UTF-8; lone surrogates, which that can't express, are written as escapes."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
