"""Results for a person and for machines: one maker of tables, one of pictures, and JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cme.files.atomic import replacing, write_text

UNKNOWN = "–"


@dataclass(frozen=True)
class Table:
    """Cells of text; in plain text all columns but the first are aligned at the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def plain(self) -> str:
        lines = [self.header, *self.rows]
        first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
        return "\n".join(
            "  ".join([line[0].ljust(first), *map(str.rjust, line[1:], others)]).rstrip() for line in lines
        )


def decimal(value: float | None, sign: str = "") -> str:
    """A number with three decimals; `sign="+"` writes the sign of positive ones too."""
    return UNKNOWN if value is None else f"{value:{sign}.3f}"


def percent(value: float | None, sign: str = "") -> str:
    """A share in percent."""
    return UNKNOWN if value is None else f"{100 * value:{sign}.1f} %"


def with_interval(
    value: float | None, interval: Sequence[float] | None, sign: str = "", share: bool = False
) -> str:
    """ "0.612 [0.501, 0.700]", or of a `share` "61.2 % [50.1, 70.0]"; without an interval the value alone."""
    shown = percent(value, sign) if share else decimal(value, sign)
    return shown if interval is None else f"{shown} {bounds(interval, sign, share)}"


def bounds(interval: Sequence[float], sign: str = "", share: bool = False) -> str:
    """An interval as "[0.501, 0.700]", or of a `share` "[50.1, 70.0]" in percent."""
    return "[" + ", ".join(f"{100 * b:{sign}.1f}" if share else f"{b:{sign}.3f}" for b in interval) + "]"


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Any]:
    """A matplotlib Figure, in inches, that is written to a PNG when all is drawn."""
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def draw_intervals(
    axes: Any,
    points: Mapping[str, tuple[float | None, Sequence[float] | None]],
    reference: float,
    colors: Sequence[str] = (),
) -> None:
    """A value and its interval per line, from the top, with a dotted line at `reference`."""
    for i, (value, interval) in enumerate(points.values()):
        color = colors[i] if colors else "tab:blue"
        if interval is not None:
            axes.plot(interval, [i, i], color=color)
        if value is not None:
            axes.plot(value, i, "o", color=color, markersize=4)
    axes.axvline(reference, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(points)), points, fontsize=8)
    axes.set_ylim(len(points) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, values: Sequence[Any]) -> None:
    write_text(path, "".join(json.dumps(value, ensure_ascii=False, default=str) + "\n" for value in values))


def versions(*packages: str) -> dict[str, str]:
    """Versions of what results depend on, `packages` included."""
    found = {"python": platform.python_version()}
    for name in ("cme", "torch", "transformers", "numpy", *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a checkout that was not installed
            found[name] = "not installed"
    return found
