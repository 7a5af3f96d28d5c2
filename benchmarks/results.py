"""results.json: one hardware, one dtype, and the cells (a shape and a pass) measured so far."""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Collection
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from benchmarks.ceilings import ALLOCATING, PREALLOCATED
from benchmarks.timing import median_ratio
from cme.files import atomic

FORMAT = 1
FILE = "results.json"
PICTURE_COLOURS = 128


class ResultsError(Exception):
    """Existing results that cannot be continued; the message names the remedy."""


def load(folder: Path, hardware: dict[str, Any], versions: dict[str, Any], settings: dict[str, Any]) -> list[Any]:
    """Cells of an earlier run that was made with the same hardware, versions and settings; [] without one.

    Raises:
        ResultsError: the file is broken, or was made with others.
    """
    path = folder / FILE
    if not path.exists():
        return []
    remedy = f"give another --output, or --fresh to measure everything again and overwrite {path}"
    try:
        old = read(folder)
        if old["format"] != FORMAT:
            raise ResultsError(f"{path} has format {old['format']}, this program writes {FORMAT}; {remedy}")
        facts = {**old["hardware"], **old["versions"], **old["settings"]}
        cells: list[Any] = old["cells"]
    except (ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path} is broken ({type(error).__name__}: {error}); {remedy}") from error
    # A package that came or went since changes no other's figures
    now = {**hardware, **{name: v for name, v in versions.items() if v is not None}, **settings}
    changed = [
        f"{name} was {facts[name]}, is {value}"
        for name, value in now.items()
        if facts.get(name) is not None and facts[name] != value
    ]
    if changed:
        raise ResultsError(f"{path} was made elsewhere: {'; '.join(changed)}. Please {remedy}")
    return cells


def save(folder: Path, results: dict[str, Any]) -> None:
    """Atomically: a reader, or a run that resumes later, finds either the old file or the new."""
    write(folder / FILE, json.dumps({"format": FORMAT, **results}, allow_nan=False) + "\n")


def read(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
    return document


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, text)


def save_picture(figure: Figure, path: Path, dpi: int) -> None:
    """A PNG of at most PICTURE_COLOURS colours, a third as large as one of all."""
    whole = io.BytesIO()
    figure.savefig(whole, dpi=dpi, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path) as temporary:
        Image.open(whole).convert("RGB").quantize(PICTURE_COLOURS).save(temporary, format="png", optimize=True)


def key(cell: dict[str, Any]) -> tuple[Any, ...]:
    return (*shape_key(cell), cell["pass"])


def shape_key(cell: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(cell["shape"].values())


def matmul_peaks(cells: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, float]]:
    """FLOP/s of the fastest bare matmuls by shape, over all passes; no shape where they did not fit."""
    peaks: dict[tuple[Any, ...], dict[str, float]] = {}
    for cell in cells:
        for name, peak in cell["matmul_peak_flop_per_second"].items():
            own = peaks.setdefault(shape_key(cell), {})
            own[name] = max(peak, own.get(name, 0))
    return peaks


def flop_unit(hardware: dict[str, Any]) -> tuple[str, float]:
    """Name and size of the unit of FLOP/s."""
    return ("TFLOP/s", 1e12) if hardware["device"] == "cuda" else ("GFLOP/s", 1e9)


def finished(cell: dict[str, Any], names: Collection[str], rounds: int) -> bool:
    """True if the cell has all these contestants, each measured as often as asked or failed in trying."""
    contestants = cell["contestants"]
    return cell["rounds"] >= rounds and all(
        name in contestants and "skipped" not in contestants[name] for name in (ALLOCATING, *names)
    )


def summarise(cell: dict[str, Any]) -> dict[str, Any]:
    """The cell with the medians of each contestant's raw samples.

    Ratios are medians over the rounds of the time over that of the matmul in the same round, and None if that
    failed. Memory that could not be measured is None.
    """
    contestants = cell["contestants"]
    return {**cell, "contestants": {name: _summarise(c, cell, contestants) for name, c in contestants.items()}}


def _summarise(own: dict[str, Any], cell: dict[str, Any], contestants: dict[str, Any]) -> dict[str, Any]:
    if "seconds" not in own:
        return own
    seconds = own["seconds"]

    def ratio(baseline: str) -> float | None:
        base = contestants.get(baseline, {}).get("seconds")
        return median_ratio(seconds, base) if base else None

    extra = [value for value in own["extra_mib"] if value is not None and not math.isnan(value)]
    flop = cell["flop"]
    if own is contestants.get(ALLOCATING) or own is contestants.get(PREALLOCATED):
        shape = cell["shape"]
        flop = 2 * shape["tokens"] * shape["hidden_size"] * shape["vocab_size"]
    return {
        **own,
        "extra_mib": extra,
        "median_ms": statistics.median(seconds) * 1e3,
        "median_ratio": ratio(ALLOCATING),
        "median_ratio_preallocated": ratio(PREALLOCATED),
        "median_extra_mib": statistics.median(extra) if extra else None,
        "flop_per_second": flop / statistics.median(seconds),
    }
