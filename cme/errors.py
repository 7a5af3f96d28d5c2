"""Errors whose message is all a user needs: what is wrong, and what to do about it."""

from __future__ import annotations

import errno


class CMEError(RuntimeError):
    """Base of the project's own errors; the command line prints them without a traceback."""


class ModelError(CMEError):
    """A model that can't be loaded, is broken, or can't be scored exactly."""


class TemplateError(CMEError, ValueError):
    """A template that doesn't fit the verifier, or that can't hold a prompt and a response."""


class DatasetError(CMEError):
    """A dataset that can't be found or read, or that lacks what training needs."""


def is_short_of_memory(error: BaseException | None) -> bool:
    """True if main memory ran out, be it while a module was loaded, which libraries report as something else."""
    while error is not None:
        if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MAPPING):
            return True
        error = error.__cause__
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """True if an allocation failed. Most devices and libraries say so in a RuntimeError, by its message only."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without its import
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


_OUT_OF_MEMORY = (
    "can't allocate memory",  # main memory
    "not enough memory",
    "bad_alloc",
    "out of memory",  # CUDA's driver, and Apple's backend
    "alloc_failed",  # cuBLAS and its kin
)

_NO_MAPPING = ("failed to map segment from shared object", "Cannot allocate memory")


def is_disk_full(error: BaseException) -> bool:
    """True if a write failed for lack of space. Writers in other languages keep only the words of the cause."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    text = str(error)
    return any(
        words in text for words in ("No space left", "File too large", "quota exceeded", "file write failed")
    )
