"""The comparison as a table and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cme.evaluation.text_report.compare import Row
from cme.files.atomic import replacing, write_text


def write(
    rows: Sequence[Row],
    drift: Mapping[str, Any],
    settings: Mapping[str, Any],
    notes: Sequence[str],
    folder: Path,
) -> str:
    """text.json, text.md and text.png; returns what is in the second."""
    text = markdown(rows, drift, settings, notes)
    result = {"settings": settings, "metrics": [asdict(row) for row in rows], "byte_drift": drift, "notes": notes}
    draw(rows, folder / "text.png")
    write_text(folder / "text.md", text)
    write_text(folder / "text.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return text


def markdown(
    rows: Sequence[Row], drift: Mapping[str, Any], settings: Mapping[str, Any], notes: Sequence[str]
) -> str:
    """A table with a line a metric."""
    lines = [
        f"A: {settings['a']}  ",
        f"B: {settings['b']}  ",
        f"{settings['prompts_compared']} prompts; intervals are 95 %, over prompts",
        "",
        "| metric | A | B | B - A | interval |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [_number(row.a), _number(row.b), _number(row.difference, "+"), _interval(row.interval_95, "+")]
        lines.append(f"| {row.metric} | {' | '.join(cells)} |")
    lines += [
        "",
        f"byte drift {_number(drift['value'])} bits {_interval(drift['interval_95'])}; between two halves of A "
        f"{_number(drift['halves_of_a'])}",
        *notes,
    ]
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row], path: Path) -> None:
    """The differences of the shares and rates, with their intervals, to a PNG."""
    from matplotlib.figure import Figure  # takes a second to import

    shown = [r for r in rows if r.metric.endswith("rate") or r.metric.startswith("distinct")]
    shown = [r for r in shown if r.difference is not None and r.interval_95 is not None]
    figure = Figure(figsize=(8, 1 + 0.4 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(reversed(shown)):
        assert row.difference is not None
        assert row.interval_95 is not None
        axes.plot(row.interval_95, (y, y), color="C0")
        axes.plot([row.difference], [y], "o", color="C0")
    axes.set_yticks(range(len(shown)), [r.metric.replace("_", " ") for r in reversed(shown)])
    axes.axvline(0, color="gray", linewidth=1)
    axes.set_xlabel("B - A, 95 % interval over prompts")
    axes.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.3f}"


def _interval(interval: Sequence[float] | None, sign: str = "") -> str:
    return "" if interval is None else f"[{_number(interval[0], sign)}, {_number(interval[1], sign)}]"
