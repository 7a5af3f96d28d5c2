"""Results for machines and for people: JSON, a table, Markdown, a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cme.files.atomic import replacing, write_text

_INTERVAL = "_interval_95"


@dataclass(frozen=True)
class Report:
    """Attributes:
    comparisons: by `A vs B`, the numbers of `outcomes.summarize`.
    calls: of the judge: how many, failures, tokens, cost. Empty where annotations were read.
    settings, versions: what the numbers depend on.
    """

    comparisons: Mapping[str, Mapping[str, Any]]
    calls: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def reliable(self) -> bool:
        """No more calls failed than are allowed."""
        return not self.calls or self.calls["failed"] <= self.calls["max_failures"] * self.calls["calls"]


def write(report: Report, folder: Path, annotations: Sequence[Mapping[str, Any]] | None = None) -> None:
    """winrate.json, winrate.md, winrate.png and, if they are given, annotations.json."""
    write_text(folder / "winrate.json", _json({"reliable": report.reliable, **asdict(report)}))
    write_text(folder / "winrate.md", markdown(report))
    if annotations is not None:
        write_text(folder / "annotations.json", _json(annotations))
    draw(report, folder / "winrate.png")


def table(report: Report) -> str:
    """The numbers, a block a comparison, with what they do and don't show; then what the judge has cost."""
    blocks = []
    for name, numbers in report.comparisons.items():
        rows = _rows(numbers)
        width = max(len(label) for label, _ in rows)
        lines = [f"  {label:<{width}}  {value}" for label, value in rows]
        blocks.append("\n".join([_title(name), *lines, *(f"  {note}" for note in remarks(numbers))]))
    judge = _about_judge(report)
    return "\n\n".join([*blocks, "\n".join(judge)] if judge else blocks)


def markdown(report: Report) -> str:
    """The same for a page."""
    parts = ["# Win rates"]
    for name, numbers in report.comparisons.items():
        rows = "\n".join(f"| {label} | {value} |" for label, value in _rows(numbers))
        parts += [f"## {_title(name)}", f"| | |\n|---|---|\n{rows}", *remarks(numbers)]
    parts += [*_about_judge(report), "![win rates with their intervals](winrate.png)"]
    settings = {"settings": report.settings, "versions": report.versions}
    parts.append(f"```json\n{_json(settings)}```")
    return "\n\n".join(parts) + "\n"


def remarks(numbers: Mapping[str, Any]) -> list[str]:
    """What a comparison shows, and what a reader must not overlook, in sentences."""
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


def _title(name: str) -> str:
    a, _, b = name.partition(" vs ")
    return f"A: {a}, B: {b}"


def _conclusion(numbers: Mapping[str, Any]) -> str:
    raw = _side(numbers[f"win_rate{_INTERVAL}"])
    controlled = _side(numbers[f"length_controlled_win_rate{_INTERVAL}"])
    if raw == "unknown":
        return "No prompt was judged."
    if raw == "even":
        return "No difference is shown: the interval of the win rate includes 50 %."
    if numbers["sign_test_p"] >= 0.05:  # with few prompts the bootstrap is too sure of itself
        return (
            f"No difference is shown: the sign test does not rule out chance (p = {numbers['sign_test_p']:.2g})."
        )
    preferred = f"The judge prefers {raw}"
    if controlled in (raw, "unknown"):
        return f"{preferred}{', also at equal length' if controlled == raw else ''}."
    return f"{preferred}, but not at equal length: the difference in length may explain it."


def _side(interval: tuple[float, float] | None) -> str:
    if interval is None:
        return "unknown"
    return "A" if interval[0] > 0.5 else "B" if interval[1] < 0.5 else "even"


def _rows(numbers: Mapping[str, Any]) -> list[tuple[str, str]]:
    n = numbers
    rows = [
        ("win rate of A, ties at half", _with_interval(n, "win_rate")),
        ("at equal length", _with_interval(n, "length_controlled_win_rate")),
        ("wins, ties, losses of A", f"{n['wins']}, {n['ties']}, {n['losses']}"),
        ("sign test, p", f"{n['sign_test_p']:.3g}"),
        ("both orders agree", _percent(n["order_agreement"])),
        ("shown first wins", _with_interval(n, "first_position_share")),
        ("mean length of A, of B", f"{_number(n['mean_length_a'])}, {_number(n['mean_length_b'])} characters"),
        ("identical responses", str(n["identical"])),
        ("failed, left out", f"{n['failed']} of {n['prompts']} prompts"),
    ]
    if n["failed"]:
        rows.append(("win rate, failures as ties", _percent(n["win_rate_failures_as_ties"])))
    return rows


def _about_judge(report: Report) -> list[str]:
    calls = report.calls
    if not calls:
        return []
    parts = [
        f"{calls['calls']:,} calls of the judge, {calls['failed']:,} failed, {calls['attempts']:,} attempts",
        f"{calls['prompt_tokens']:,} prompt and {calls['completion_tokens']:,} completion tokens",
    ]
    if calls["answers_without_token_counts"]:
        parts.append(f"{calls['answers_without_token_counts']:,} answers did not say how many")
    if calls["cost_usd"] is not None:
        parts.append(f"{calls['cost_usd']:.4f} US dollars")
    lines = ["; ".join(parts) + "."]
    mass = calls["mean_label_probability"]
    if mass is not None and mass < 0.5:
        lines.append(f"The judge itself would write something else than a verdict: labels have {_percent(mass)}.")
    if not report.reliable:
        lines.append("NOT RELIABLE: more calls of the judge failed than are allowed.")
    return lines


def draw(report: Report, path: Path) -> None:
    """Win rates with their intervals, and wins, ties and losses, to a PNG."""
    from matplotlib.figure import Figure  # takes a second to import

    names = list(report.comparisons)
    figure = Figure(figsize=(11, 1.8 + 0.9 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for shift, key, label in (
        (-0.12, "win_rate", "win rate"),
        (0.12, "length_controlled_win_rate", "at equal length"),
    ):
        points = [
            (i, n[key], n[key + _INTERVAL])
            for i, n in enumerate(report.comparisons.values())
            if n[key + _INTERVAL]
        ]
        if points:
            y = [i + shift for i, *_ in points]
            x = [100 * value for _, value, _ in points]
            ends = [[100 * abs(value - bounds[k]) for _, value, bounds in points] for k in (0, 1)]
            left.errorbar(x, y, xerr=ends, fmt="o", capsize=4, label=label)
    left.axvline(50, color="grey", linestyle=":")
    left.set(
        xlim=(0, 100), xlabel="% for A, with 95 % interval", title="A's win rate", ylim=(len(names) - 0.5, -0.5)
    )
    left.set_yticks(range(len(names)), [name.replace(" vs ", "\nvs ") for name in names])
    if left.get_legend_handles_labels()[0]:
        left.legend(fontsize=8)
    start = [0] * len(names)
    for key, color in (("wins", "tab:green"), ("ties", "lightgrey"), ("losses", "tab:red"), ("failed", "black")):
        counts = [n[key] for n in report.comparisons.values()]
        if sum(counts):
            right.barh(range(len(names)), counts, 0.5, left=start, label=key, color=color)
        start = [a + b for a, b in zip(start, counts, strict=True)]
    right.set(xlabel="prompts", title="A's wins, ties and losses")
    right.legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _with_interval(numbers: Mapping[str, Any], key: str) -> str:
    interval = numbers[key + _INTERVAL]
    if interval is None:
        return _percent(numbers[key])
    return f"{_percent(numbers[key])}  [{_percent(interval[0])}, {_percent(interval[1])}]"


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f}"


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
