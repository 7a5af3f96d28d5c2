"""A folder of things that were built once: each appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import BaseFileLock, FileLock, Timeout

_MANIFEST = "cme-manifest.json"


def cache_folder() -> Path:
    """$CME_CACHE, else cme in $XDG_CACHE_HOME, else ~/.cache/cme."""
    if chosen := os.environ.get("CME_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cme"


def is_complete(folder: Path, source: str) -> bool:
    """True if `folder` was built from `source` and every file still has the size it was written with."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return manifest["source"] == source and all(
            (folder / name).stat().st_size == size for name, size in manifest["bytes"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def build_once(
    folder: Path, source: str, build: Callable[[Path, Path], None], on_wait: Callable[[], None] = lambda: None
) -> None:
    """Make sure that `folder` is complete; if it is not, `build(work, out)` fills `out`, which then becomes it.

    One process builds; the others call `on_wait` and wait. `work` is a scratch folder beside `folder`, deleted
    afterwards; the scratch folder of a killed process is deleted by the next one that builds.

    Raises:
        OSError: the cache can't be written.
    """
    if is_complete(folder, source):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _acquired(FileLock(folder.parent / f".{folder.name}.lock"), on_wait):
        if is_complete(folder, source):  # the process we waited for built it
            return
        prefix = f".{folder.name}.tmp-"
        for stale in folder.parent.glob(f"{prefix}*"):
            shutil.rmtree(stale, ignore_errors=True)
        with TemporaryDirectory(prefix=prefix, dir=folder.parent, ignore_cleanup_errors=True) as name:
            work = Path(name)
            out = work / "out"
            out.mkdir()
            build(work, out)
            sizes = {str(p.relative_to(out)): p.stat().st_size for p in sorted(out.rglob("*")) if p.is_file()}
            manifest = json.dumps({"source": source, "bytes": sizes}, indent=1)
            (out / _MANIFEST).write_text(manifest, encoding="utf-8")
            if folder.exists():
                folder.rename(work / "damaged")
            out.rename(folder)


def _acquired(lock: BaseFileLock, on_wait: Callable[[], None]) -> AbstractContextManager[object]:
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        on_wait()
        return lock.acquire()
