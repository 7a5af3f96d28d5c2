"""A run's numbers as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cme.evaluation.correctness.signals import HEADLINE

HEADER = ("signal", "AUROC [95 %]", "pairs", "best of N [95 %]", "AURC", "Brier skill", "ECE")


def verdict(result: Mapping[str, Any]) -> list[str]:
    """Whether the headline signal beats chance and each control; which signal that is was fixed beforehand."""
    headline = result["signals"][HEADLINE]
    if headline["auroc"] is None:
        return ["no verdict: AUROC is undefined"]
    low, high = headline["auroc_interval"]
    state = "above chance" if low > 0.5 else "BELOW chance" if high < 0.5 else "NOT shown to differ from chance"
    lines = [f"{HEADLINE}: AUROC {headline['auroc']:.3f} [{low:.3f}, {high:.3f}], {state}"]
    for name, signal in result["signals"].items():
        if signal["control"]:
            difference, (low, high) = (signal["auroc_below_headline"][k] for k in ("difference", "interval"))
            state = "better" if low > 0 else "WORSE" if high < 0 else "NOT shown to be better"
            lines.append(f"  against {name}: {difference:+.3f} [{low:+.3f}, {high:+.3f}], {state}")
    return lines


def counts(result: Mapping[str, Any]) -> list[str]:
    c, b = result["counts"], result["baselines"]
    lines = [
        f"{c['responses']:,} responses to {c['questions']:,} questions, {c['accuracy']:.1%} right; "
        f"{c['questions_with_right_and_wrong']:,} questions have right and wrong ones"
    ]
    if b["mean_accuracy"] is not None:
        lines.append(
            f"best of N: between {b['mean_accuracy']:.1%} (a random choice) and {b['oracle_accuracy']:.1%} "
            f"(oracle); AURC: between {b['risk_area_of_chance']:.3f} (chance) and {b['risk_area_of_oracle']:.3f} "
            "(oracle)"
        )
    for reason, count in result["left_out"].items():
        lines.append(f"left out for every signal: {count:,} responses, {reason}")
    if result["malformed"]:
        lines.append(f"left out: {result['malformed']:,} malformed lines of the file")
    return lines + [f"note: {reason}" for reason in result["undefined"]]


def rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table's cells, a row a signal, the verifier's first."""
    return [_row(name, signal) for name, signal in result["signals"].items()]


def plain(result: Mapping[str, Any]) -> str:
    """For a terminal."""
    cells = [HEADER, *rows(result)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(HEADER))]
    table = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]
    return "\n".join([*counts(result), "", *table, "", *verdict(result)])


def markdown(result: Mapping[str, Any]) -> str:
    lines = [f"# Correctness: {result['about']}", ""]
    settings = {name: value for name, value in result["settings"].items() if value is not None}
    lines += [", ".join(f"{name} {value}" for name, value in settings.items()), ""]
    lines += [f"- {line}" for line in counts(result)] + [""]
    lines += [_line(HEADER), _line(["---"] * len(HEADER)), *map(_line, rows(result)), ""]
    lines += [f"- {line.strip()}" for line in verdict(result)] + [""]
    lines += [_LEGEND, "", "versions: " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()), ""]
    return "\n".join(lines)


_LEGEND = (
    "Every signal is turned so that higher means more likely right (perplexity, entropy, bits per byte and length "
    "are negated). AUROC over all responses; pairs: share of the pairs of a right and a wrong response to one "
    "question that are in order; best of N: accuracy of the response with the highest value; AURC: mean error rate "
    "over all coverages, lower is better; Brier skill and ECE: after Platt's method, fitted on other questions. "
    "Intervals resample questions. `answer_` is the answer alone, given the response before it."
)


def _row(name: str, s: Mapping[str, Any]) -> tuple[str, ...]:
    calibration = s["calibration"] or {"brier_skill": None, "ece": None}
    return (
        name,
        f"{_fixed(s['auroc'])} {_interval(s['auroc_interval'])}".strip(),
        _percent(s["pair_accuracy"]),
        f"{_percent(s['best_of_n'])} {_interval(s['best_of_n_interval'], percent=True)}".strip(),
        _fixed(s["risk_area"]),
        _fixed(calibration["brier_skill"], sign="+"),
        _fixed(calibration["ece"]),
    )


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _fixed(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.3f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _interval(bounds: Sequence[float] | None, percent: bool = False) -> str:
    if bounds is None:
        return ""
    return "[" + ", ".join(f"{100 * b:.1f}" if percent else f"{b:.3f}" for b in bounds) + "]"
