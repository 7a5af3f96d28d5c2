"""Results for machines and for people: JSON, a table, Markdown, a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cme.evaluation.report import UNKNOWN, Table, draw_intervals, percent, picture, with_interval, write_json
from cme.files.atomic import write_text

_INTERVAL = "_interval_95"

Numbers = Mapping[str, Any]
"""Those of `outcomes.summarize`."""


@dataclass(frozen=True)
class Report:
    """The results of a run.

    Attributes:
        comparisons: the numbers of each, by `A vs B`.
        calls: of the judge: how many, failures, tokens. Empty where annotations were read.
        settings, versions: what the numbers depend on.
    """

    comparisons: Mapping[str, Numbers]
    calls: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def reliable(self) -> bool:
        """No more calls failed than are allowed."""
        return not self.calls or self.calls["failed"] <= self.calls["max_failures"] * self.calls["calls"]


def write(report: Report, folder: Path, annotations: Sequence[Mapping[str, Any]] | None = None) -> None:
    """winrate.json, winrate.md, winrate.png and, if they are given, annotations.json."""
    write_json(folder / "winrate.json", {"reliable": report.reliable, **asdict(report)})
    write_text(folder / "winrate.md", markdown(report))
    if annotations is not None:
        write_json(folder / "annotations.json", annotations)
    draw(report, folder / "winrate.png")


def plain(report: Report) -> str:
    """A table per comparison, with what it does and doesn't show; then the calls of the judge."""
    blocks = [
        "\n  ".join([*table(name, numbers).plain().splitlines(), *remarks(numbers)])
        for name, numbers in report.comparisons.items()
    ]
    return "\n\n".join([*blocks, "\n".join(_about_judge(report))]).rstrip()


def markdown(report: Report) -> str:
    """The same for a page."""
    parts = ["# Win rates"]
    for name, numbers in report.comparisons.items():
        parts += [table(name, numbers).markdown(), *remarks(numbers)]
    parts += [*_about_judge(report), "![win rates with their intervals](winrate.png)"]
    settings = {"settings": report.settings, "versions": report.versions}
    parts.append(f"```json\n{json.dumps(settings, indent=2, ensure_ascii=False)}\n```")
    return "\n\n".join(parts) + "\n"


def table(name: str, numbers: Numbers) -> Table:
    """The numbers of the comparison `A vs B`."""
    n = numbers
    a, _, b = name.partition(" vs ")
    lengths = (UNKNOWN if n[key] is None else f"{n[key]:,.0f}" for key in ("mean_length_a", "mean_length_b"))
    rows = [
        ("win rate of A, ties at half", _rate(n, "win_rate")),
        ("at equal length", _rate(n, "length_controlled_win_rate")),
        ("wins, ties, losses of A", f"{n['wins']}, {n['ties']}, {n['losses']}"),
        ("sign test, p", f"{n['sign_test_p']:.3g}"),
        ("both orders agree", percent(n["order_agreement"])),
        ("shown first wins", _rate(n, "first_position_share")),
        ("mean length of A, of B", f"{', '.join(lengths)} characters"),
        ("identical responses", str(n["identical"])),
        ("failed, left out", f"{n['failed']} of {n['prompts']} prompts"),
    ]
    if n["failed"]:
        rows.append(("win rate, failures as ties", percent(n["win_rate_failures_as_ties"])))
    return Table((f"A: {a}, B: {b}", ""), rows)


def _rate(numbers: Numbers, key: str) -> str:
    return with_interval(numbers[key], numbers[key + _INTERVAL], share=True)


def remarks(numbers: Numbers) -> list[str]:
    """Sentences about a comparison: its conclusion, and what a reader must not overlook."""
    found = [_conclusion(numbers)]
    bias = numbers[f"first_position_share{_INTERVAL}"]
    if bias is not None and not bias[0] <= 0.5 <= bias[1]:
        place = "first" if bias[0] > 0.5 else "second"
        found.append(f"The judge favours the response that it is shown {place}.")
    agreement = numbers["order_agreement"]
    if agreement is not None and agreement < 0.5:
        found.append("The judge contradicts itself on most prompts when the order changes.")
    for letter, count in (("A", numbers["empty_a"]), ("B", numbers["empty_b"])):
        if count:
            found.append(f"{count} of {letter}'s responses are empty.")
    return found


def _conclusion(numbers: Numbers) -> str:
    raw = _side(numbers[f"win_rate{_INTERVAL}"])
    controlled = _side(numbers[f"length_controlled_win_rate{_INTERVAL}"])
    if raw == "unknown":
        return f"There is no verdict: the judge failed on all of the {numbers['prompts']} prompts."
    if raw == "even":
        return "No difference is shown: the interval of the win rate includes 50 %."
    if numbers["sign_test_p"] >= 0.05:  # with few prompts the bootstrap is too sure of itself
        p = numbers["sign_test_p"]
        return f"No difference is shown: the sign test does not rule out chance (p = {p:.2g})."
    preferred = f"The judge prefers {raw}"
    if controlled in (raw, "unknown"):
        return f"{preferred}{', also at equal length' if controlled == raw else ''}."
    return f"{preferred}, but not at equal length: the difference in length may explain it."


def _side(interval: tuple[float, float] | None) -> str:
    if interval is None:
        return "unknown"
    return "A" if interval[0] > 0.5 else "B" if interval[1] < 0.5 else "even"


def _about_judge(report: Report) -> list[str]:
    calls = report.calls
    if not calls:
        return []
    lines = [
        f"{calls['calls']:,} calls of the judge, {calls['failed']:,} failed, {calls['attempts']:,} attempts; "
        f"{calls['prompt_tokens']:,} prompt and {calls['completion_tokens']:,} completion tokens."
    ]
    mass = calls["mean_label_probability"]
    if mass is not None and mass < 0.5:
        lines.append(f"The judge itself would write something else than a verdict: labels have {percent(mass)}.")
    if not report.reliable:
        lines.append("NOT RELIABLE: more calls of the judge failed than are allowed.")
    return lines


def draw(report: Report, path: Path) -> None:
    """Win rates with their intervals, to a PNG."""
    points = {
        f"{name}{note}": (n[key], n[key + _INTERVAL])
        for name, n in report.comparisons.items()
        for key, note in (("win_rate", ""), ("length_controlled_win_rate", "\nat equal length"))
    }
    with picture(path, 9, 1.2 + 0.5 * len(points)) as figure:
        axes = figure.subplots()
        draw_intervals(axes, points, 0.5)
        axes.set(xlim=(0, 1), xlabel="win rate of the first, with its 95 % interval")
