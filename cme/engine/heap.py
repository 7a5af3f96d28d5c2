"""Freed memory: kept for the next layer during forward passes, given back to the system after them."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from typing import Any

import torch

MIB = 2**20


def release(device: torch.device) -> None:
    """Give back to the system what has been freed."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim()


def trim() -> None:
    """Give back what has been freed in main memory, where the C library keeps it (glibc)."""
    malloc_trim = getattr(_libc(), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of mallopt(3), from malloc.h of glibc."""


@contextlib.contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Let the C library keep freed blocks of less than 16 MiB until the end, where it can (glibc)."""
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is None:
        yield
        return
    # Layers allocate the same sizes over and over. Left alone glibc returns them to the system at once, and each
    # page that it asks for again is a fault: a sixth of the time of a small model. Larger blocks would leave holes
    # that add up
    mallopt(M_MMAP_THRESHOLD, 16 * MIB)
    mallopt(M_TRIM_THRESHOLD, 2047 * MIB)  # all: the argument is an int, of bytes
    try:
        yield
    finally:
        # What glibc arrives at by itself once large blocks have been freed; mallopt ends its own adjustment
        mallopt(M_MMAP_THRESHOLD, 32 * MIB)
        mallopt(M_TRIM_THRESHOLD, 64 * MIB)
        trim()


def _libc() -> Any:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return None
