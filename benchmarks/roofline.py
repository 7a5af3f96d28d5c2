"""roofline.png, from what results.json holds: how near each contestant comes to the two measured ceilings.

The bytes under an arithmetic intensity are the least that a pass can move: its operands and gradients, and, for a
contestant whose logits pass through memory, these once out and once in. So each panel has two columns of points,
spread sideways a little so that they can be told apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import torch

from benchmarks.ceilings import ALLOCATING, PREALLOCATED
from benchmarks.peers import BACKWARD, FORWARD, FROZEN
from benchmarks.results import flop_unit, matmul_peaks, save_picture, shape_key

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

MARKERS = "osD^vPX<>*hdp8H"
OURS = "cme"


def draw(results: dict[str, Any], path: Path) -> None:
    """One panel per shape and pass; nothing where no cell is measured."""
    cells = [cell for cell in results["cells"] if any("seconds" in c for c in cell["contestants"].values())]
    if not cells:
        return
    passes = list(dict.fromkeys(cell["pass"] for cell in cells))
    shapes = list(dict.fromkeys(shape_key(cell) for cell in cells))
    styles = _styles(results["peers"], cells)
    columns = min(len(shapes), 4)
    bands = -(-len(shapes) // columns)  # of rows of panels, each with one row per pass
    figure, panels = pyplot.subplots(
        bands * len(passes),
        columns,
        figsize=(1.2 + 3.2 * columns, 1.8 + 2.9 * bands * len(passes)),
        squeeze=False,
        layout="constrained",
    )
    for panel in panels.flat:
        panel.set_axis_off()
    for cell in cells:
        band, column = divmod(shapes.index(shape_key(cell)), columns)
        panel = panels[band * len(passes) + passes.index(cell["pass"]), column]
        panel.set_axis_on()
        _panel(panel, cell, results, styles)
    _legend(figure, panels, columns, styles)
    figure.suptitle(_title(results))
    save_picture(figure, path, dpi=110)
    pyplot.close(figure)


def _title(results: dict[str, Any]) -> str:
    hardware, dtype = results["hardware"], results["settings"]["dtype"]
    threads = hardware.get("threads")
    suffix = "" if threads is None else f", {threads} thread" + "s" * (threads > 1)
    return f"{hardware['name']}{suffix}, {dtype}"


def _legend(figure: Figure, panels: Any, columns: int, styles: dict[str, Any]) -> None:
    """The contestants in the registry's order, then the ceilings."""
    found: dict[str, Any] = {}
    for panel in panels.flat:
        handles, names = panel.get_legend_handles_labels()
        found |= dict(zip(names, handles, strict=True))
    names = sorted(found, key=lambda name: list(styles).index(name) if name in styles else len(styles))
    figure.legend(
        [found[name] for name in names],
        names,
        loc="outside lower center",
        ncols=min(2 * columns, 6, len(names)),
        frameon=False,
        fontsize=9,
    )


def intensity(shape: dict[str, Any], pass_name: str, flop: int, itemsize: int, in_memory: bool) -> float:
    """FLOP per byte that the pass has to move, see the module's docstring."""
    n, h, v = shape["tokens"], shape["hidden_size"], shape["vocab_size"]
    # The forward reads its operands; a backward reads them again and writes a gradient of each, or of hidden alone
    elements = {FORWARD: (n + v) * h, BACKWARD: 3 * (n + v) * h, FROZEN: (3 * n + 2 * v) * h}[pass_name]
    # The gradient of the logits is as large as they are, and is read by each of the products
    crossings = {FORWARD: 2, BACKWARD: 5, FROZEN: 4}[pass_name] if in_memory else 0
    return flop / (itemsize * (elements + crossings * n * v))


def _styles(peers: list[dict[str, Any]], cells: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    measured = {name for cell in cells for name, own in cell["contestants"].items() if "seconds" in own}
    names = [p["name"] for p in peers if p["name"] in measured]
    colours = [matplotlib.colormaps["tab20"](i) for i in (*range(0, 20, 2), *range(1, 20, 2))]
    styles = {}
    for i, name in enumerate(names):
        ours = name.startswith(OURS)
        colour = "black" if ours else colours[i % len(colours)]
        styles[name] = {
            "marker": "*" if ours else MARKERS[i % len(MARKERS)],
            "color": colour,
            "markerfacecolor": "none" if name != OURS and ours else colour,
            "markersize": 11 if ours else 6,
            "zorder": 4 if ours else 3,
        }
    return styles


def _panel(panel: Axes, cell: dict[str, Any], results: dict[str, Any], styles: dict[str, dict[str, Any]]) -> None:
    shape, pass_name = cell["shape"], cell["pass"]
    itemsize = getattr(torch, results["settings"]["dtype"]).itemsize
    peaks, bandwidth = matmul_peaks(results["cells"])[shape_key(cell)], results["copy_bytes_per_second"]
    unit, scale = flop_unit(results["hardware"])
    columns = {flag: intensity(shape, pass_name, cell["flop"], itemsize, flag) for flag in (True, False)}
    in_memory = {p["name"]: p["in_memory"] for p in results["peers"]}
    heights = {
        name: cell["contestants"][name]["flop_per_second"] / scale
        for name in styles
        if "seconds" in cell["contestants"].get(name, {})
    }
    peak, allocating = peaks[PREALLOCATED] / scale, peaks[ALLOCATING] / scale
    ridge = peaks[PREALLOCATED] / bandwidth
    left, right = min(ridge, columns[True]) / 1.6, max(ridge, columns[False]) * 3
    grey: dict[str, Any] = {"color": "0.3", "zorder": 2}
    panel.plot([left, ridge], [left * bandwidth / scale, peak], lw=1.6, label="copy bandwidth", **grey)
    panel.plot([ridge, right], [peak, peak], lw=1.6, ls=(0, (5, 1.5)), label="bare matmul", **grey)
    start = peaks[ALLOCATING] / bandwidth
    panel.plot([start, right], [allocating] * 2, lw=1, ls=":", label="bare matmul that allocates", **grey)
    sideways = min(1.08, (columns[False] / columns[True]) ** (0.8 / max(len(heights), 1)))
    for flag, column in columns.items():
        names = [name for name in heights if in_memory[name] == flag]
        for i, name in enumerate(names):
            x = column * sideways ** (i - (len(names) - 1) / 2)
            panel.plot(x, heights[name], linestyle="none", label=name, **styles[name])
    lowest = min([allocating, *heights.values()])
    panel.set(xscale="log", yscale="log", xlim=(left, right), ylim=(lowest / 1.7, max(peak, allocating) * 1.3))
    for flag, text, side in ((True, "logits\nin memory", "right"), (False, "logits never\nin memory", "left")):
        at = (columns[flag], 0.02)
        panel.annotate(text, at, xycoords=("data", "axes fraction"), ha=side, fontsize=7, color="0.3")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    panel.tick_params(labelsize=8)
    panel.grid(True, lw=0.3, color="0.85")
    panel.set_xlabel("FLOP / byte", fontsize=8)
    panel.set_ylabel(unit, fontsize=8)
    sizes = f"N={shape['tokens']} H={shape['hidden_size']} V={shape['vocab_size']}"
    panel.set_title(f"{shape['name']}, {pass_name}\n{sizes}", fontsize=9)
