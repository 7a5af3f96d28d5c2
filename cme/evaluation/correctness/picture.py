"""A run's numbers as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cme.evaluation.correctness.signals import HEADLINE
from cme.files.atomic import replacing

_VERIFIER, _CONTROL = "tab:blue", "tab:gray"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """AUROC with intervals, accuracy against coverage, and reliability, to a PNG."""
    from matplotlib.figure import Figure  # takes a second to import

    signals = result["signals"]
    figure = Figure(figsize=(13, max(4.5, 1.5 + 0.27 * len(signals))), layout="constrained")
    areas, coverage, reliability = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    _draw_areas(areas, signals)
    _draw_coverage(coverage, result)
    _draw_reliability(reliability, signals[HEADLINE]["calibration"])
    figure.suptitle(result["about"], fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _draw_areas(axes: Any, signals: Mapping[str, Any]) -> None:
    names = list(signals)[::-1]
    for i, name in enumerate(names):
        signal = signals[name]
        if signal["auroc"] is None:
            continue
        colour = _CONTROL if signal["control"] else _VERIFIER
        if signal["auroc_interval"] is not None:
            axes.plot(signal["auroc_interval"], [i, i], color=colour)
        axes.plot(signal["auroc"], i, "o", color=colour, markersize=4)
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_title("AUROC, 95 % interval over questions", fontsize=10)
    axes.set_xlabel("blue: the verifier; grey: controls; dotted: chance", fontsize=8)
    axes.grid(axis="x", alpha=0.3)


def _draw_coverage(axes: Any, result: Mapping[str, Any]) -> None:
    shown = [
        name
        for name, s in result["signals"].items()
        if name == HEADLINE or (s["control"] and "answer" not in name)
    ]
    for name in shown:
        curve = result["signals"][name]["selective_accuracy"]
        style = {"linewidth": 2.5} if name == HEADLINE else {"linewidth": 1, "linestyle": "--"}
        axes.plot([float(c) for c in curve], list(curve.values()), label=name, **style)
    axes.axhline(result["counts"]["accuracy"], color="black", linewidth=0.8, linestyle=":", label="all responses")
    axes.set_ylim(-0.02, 1.02)
    axes.set_title("accuracy of the responses kept", fontsize=10)
    axes.set_xlabel("coverage: share of the responses kept, highest values first", fontsize=8)
    axes.legend(fontsize=6)
    axes.grid(alpha=0.3)


def _draw_reliability(axes: Any, calibration: Mapping[str, Any] | None) -> None:
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
    if calibration is None:
        axes.text(0.5, 0.5, "undefined", ha="center")
    else:
        bins = calibration["reliability"]
        axes.plot([b["probability"] for b in bins], [b["accuracy"] for b in bins], "o-", color=_VERIFIER)
    axes.set_title(f"reliability of {HEADLINE}", fontsize=10)
    axes.set_xlabel("probability of being right, fitted on other questions", fontsize=8)
    axes.set_ylabel("share that is right", fontsize=8)
    axes.grid(alpha=0.3)
