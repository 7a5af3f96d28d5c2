"""Folders of weights that are complete or not used: a manifest, written last, has each file's size and hash."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from cme.files.atomic import sha256, write_text

_MANIFEST = "cme-manifest.json"
_TRAINING_STATE = ("optimizer", "scheduler", "rng_state", "scaler", "trainer_state")


def seal(folder: Path, step: int) -> None:
    """Declare the folder of a step complete: its files have to stay as they are."""
    paths = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    _write_manifest(folder, step, {name: _fingerprint(folder / name) for name in paths if name != _MANIFEST})


def sealed_step(folder: Path) -> int | None:
    """The optimizer steps behind a sealed folder, its files not looked at; None for one that is not sealed."""
    manifest = _read_manifest(folder)
    return None if manifest is None else int(manifest["step"])


def damage(folder: Path) -> str | None:
    """Why a folder is not complete; None if it is as it was sealed."""
    manifest = _read_manifest(folder)
    if manifest is None:
        return f"it has no {_MANIFEST}, which is written last"
    for name, written in manifest["files"].items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _fingerprint(folder / name) != written:
            return f"{name} is not as it was written"
    return None


def lacks_optimizer(checkpoint: Path) -> bool:
    """Whether a sealed checkpoint has weights only (--save_only_model)."""
    manifest = _read_manifest(checkpoint) or {"files": ()}
    return not any("optim" in name for name in manifest["files"])  # DeepSpeed: ..._optim_states.pt


def link_weights(checkpoint: Path, target: Path) -> None:
    """Put the weights of a sealed checkpoint into `target`: as links, which outlive it and take no room."""
    manifest = _read_manifest(checkpoint)
    assert manifest is not None
    files = {name: kept for name, kept in manifest["files"].items() if not name.startswith(_TRAINING_STATE)}
    new = target.with_name(target.name + ".tmp")
    shutil.rmtree(new, ignore_errors=True)
    for name in files:
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        _link(checkpoint / name, new / name)
    _write_manifest(new, manifest["step"], files)
    shutil.rmtree(target, ignore_errors=True)
    new.rename(target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _write_manifest(folder: Path, step: int, files: dict[str, Any]) -> None:
    write_text(folder / _MANIFEST, json.dumps({"step": step, "files": files}, indent=1))


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and {"step", "files"} <= manifest.keys() else None
