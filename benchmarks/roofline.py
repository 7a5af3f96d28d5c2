"""roofline.png, from what results.json holds: how near each contestant comes to the two measured ceilings.

The bytes under an arithmetic intensity are the least that a pass can move: its operands and gradients, and, for a
contestant whose logits pass through memory, these once out and once in. So each panel has two columns of points.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import torch

from benchmarks.ceilings import ALLOCATING, PREALLOCATED
from benchmarks.peers import BACKWARD, FORWARD, FROZEN

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

MARKERS = "osD^vPX<>*hdp8H"
OURS = "cme"


def draw(results: dict[str, Any], path: Path) -> None:
    """One panel per shape and pass; nothing where no cell is measured."""
    cells = [cell for cell in results["cells"] if any("seconds" in c for c in cell["contestants"].values())]
    if not cells:
        return
    passes = list(dict.fromkeys(cell["pass"] for cell in cells))
    shapes = list(dict.fromkeys(tuple(cell["shape"].values()) for cell in cells))
    styles = _styles(results["peers"], cells)
    figure, panels = pyplot.subplots(
        len(passes),
        len(shapes),
        figsize=(1.2 + 3.1 * len(shapes), 1.6 + 2.9 * len(passes)),
        squeeze=False,
        layout="constrained",
    )
    for row, pass_name in zip(panels, passes, strict=True):
        for panel, shape in zip(row, shapes, strict=True):
            cell = next((c for c in cells if (*c["shape"].values(), c["pass"]) == (*shape, pass_name)), None)
            if cell is None:
                panel.set_axis_off()
            else:
                _panel(panel, cell, results, styles)
    for panel in panels[:, 0]:
        panel.set_ylabel("TFLOP/s")
    for panel in panels[-1]:
        panel.set_xlabel("FLOP / byte")
    handles: dict[str, Any] = {}
    for panel in panels.flat:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    order = [*styles, *(label for label in handles if label not in styles)]
    names = [name for name in order if name in handles]
    figure.legend(
        [handles[name] for name in names],
        names,
        loc="outside lower center",
        ncols=min(6, len(names)),
        frameon=False,
    )
    hardware = results["hardware"]
    threads = f", {hardware['threads']} threads" if "threads" in hardware else ""
    figure.suptitle(f"{hardware['name']}{threads}, {results['settings']['dtype']}")
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=160)
    pyplot.close(figure)
    temporary.replace(path)


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
    in_memory = {p["name"]: p["in_memory"] for p in results["peers"]}
    points = {
        name: (intensity(shape, pass_name, cell["flop"], itemsize, in_memory[name]), own["flop_per_second"] / 1e12)
        for name, own in cell["contestants"].items()
        if name in styles and "seconds" in own
    }
    peaks = cell["matmul_peak_flop_per_second"]
    bandwidth = results["copy_bytes_per_second"] / 1e12
    peak = peaks[PREALLOCATED] / 1e12
    ridge = peak / bandwidth
    xs = [x for x, _ in points.values()]
    left, right = min([ridge, *xs]) / 2, max([ridge, *xs]) * 2
    panel.plot([left, ridge], [left * bandwidth, peak], color="0.35", lw=1.6, label="copy bandwidth")
    panel.plot([ridge, right], [peak, peak], color="0.35", lw=1.6, ls=(0, (6, 1)), label="bare matmul")
    panel.plot(
        [peaks[ALLOCATING] / 1e12 / bandwidth, right],
        [peaks[ALLOCATING] / 1e12] * 2,
        color="0.35",
        lw=1,
        ls=":",
        label="bare matmul, allocating",
    )
    for name, (x, y) in points.items():
        panel.plot(x, y, linestyle="none", label=name, **styles[name])
    panel.set(xscale="log", yscale="log", xlim=(left, right))
    lowest = min([peak, *(y for _, y in points.values())])
    panel.set_ylim(lowest / 1.6, peak * 1.4)
    panel.grid(True, which="both", lw=0.3, color="0.85")
    sizes = f"N={shape['tokens']} H={shape['hidden_size']} V={shape['vocab_size']}"
    panel.set_title(f"{shape['name']}, {pass_name}\n{sizes}", fontsize=9)
