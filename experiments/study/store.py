"""Cells that were run: one JSON file per cell while a study is under way, one archive of them all once it is done.

The archive lies beside the folder and has its name with `.jsonl.xz` after it: one line per cell, sorted by name. A
file in the folder stands before the line of the same name.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

from cme.errors import CMEError
from cme.files import atomic

Cell = dict[str, Any]


def archive_of(folder: Path) -> Path:
    """The archive of a folder of results, whether it exists or not."""
    return folder.with_name(folder.name + ".jsonl.xz")


def file_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def place_of(folder: Path, name: str) -> str:
    """The file that holds a finished cell, in words."""
    file = file_of(folder, name)
    return str(file) if file.exists() else f"{name} in {archive_of(folder)}"


def name_of(cell: Cell) -> str:
    return f"{cell['task']}-{cell['reward']}-{cell['seed']}"


def read(folder: Path) -> dict[str, Cell]:
    """All cells of a study by name. Raises CMEError if the archive can't be read."""
    cells = {}
    path = archive_of(folder)
    if path.exists():
        try:
            with lzma.open(path, "rt", encoding="utf-8") as lines:
                cells = {name_of(cell): cell for cell in map(json.loads, lines)}
        except (OSError, EOFError, lzma.LZMAError, ValueError) as error:
            raise CMEError(f"could not read {path}: {error}; restore it, or give another --results") from error
    for file in folder.glob("*.json"):
        cells[file.stem] = json.loads(file.read_text(encoding="utf-8"))
    return dict(sorted(cells.items()))


def save(folder: Path, cell: Cell) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_text(file_of(folder, name_of(cell)), json.dumps(cell) + "\n")


def pack(folder: Path) -> Path:
    """Move the files of the folder into the archive, which is returned."""
    cells = read(folder)
    path = archive_of(folder)
    with atomic.replacing(path) as temporary, lzma.open(temporary, "wt", encoding="utf-8", preset=9) as lines:
        lines.writelines(json.dumps(cell, separators=(",", ":")) + "\n" for cell in cells.values())
    for name in cells:
        file_of(folder, name).unlink(missing_ok=True)
    return path
