"""A run's numbers as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cme.evaluation.correctness.result import MIN_QUESTIONS
from cme.evaluation.correctness.signals import ANSWER_HEADLINE, HEADLINE

HEADER = ("signal", "AUROC [95 %]", "pairs [95 %]", "best of N [95 %]", "AURC", "Brier skill", "ECE")


def verdict(result: Mapping[str, Any]) -> list[str]:
    """Whether the verifier's likelihood, of the response and of the answer, beats chance and its controls. That it
    is this signal which is judged was fixed beforehand."""
    return [
        line
        for name in (HEADLINE, ANSWER_HEADLINE)
        if name in result["signals"]
        for line in _verdict_on(name, result)
    ]


def _verdict_on(name: str, result: Mapping[str, Any]) -> list[str]:
    signal, c = result["signals"][name], result["counts"]
    if signal["auroc"] is None:
        return [f"{name}: no verdict, AUROC is undefined"]
    few = min(c["questions_with_right"], c["questions_with_wrong"])
    area, interval = signal["auroc"], signal["auroc_interval"]
    lines = [f"{name}: AUROC {area:.3f} {_interval(interval)} against 0.5, {_state(interval, 0.5, few)}"]
    if signal["pair_accuracy"] is not None:
        pairs, interval = signal["pair_accuracy"], signal["pair_accuracy_interval"]
        state = _state(interval, 0.5, c["questions_with_right_and_wrong"])
        lines.append(
            f"  right above wrong within a question: {_percent(pairs)} {_interval(interval, percent=True)} "
            f"against 50 %, {state}"
        )
    for other, control in result["signals"].items():
        if control["control"] and control["auroc_below"]["reference"] == name:
            difference, interval = (control["auroc_below"][k] for k in ("difference", "interval"))
            lines.append(
                f"  AUROC above {other}: {difference:+.3f} {_interval(interval, sign='+')}, "
                f"{_state(interval, 0, few)}"
            )
    return lines


def _state(interval: Sequence[float] | None, reference: float, questions: int) -> str:
    """What an interval says; nothing if it comes from too few questions, or there is none."""
    if questions < MIN_QUESTIONS:
        return f"undecided: {questions} questions are too few"
    if interval is None:
        return "undecided: no resample has right and wrong responses, raise --resamples"
    low, high = interval
    if low <= reference <= high:
        return "NOT shown to be better"
    return "better" if low > reference else "WORSE"


def counts(result: Mapping[str, Any]) -> list[str]:
    c, b = result["counts"], result["baselines"]
    lines = [
        f"{c['responses']:,} responses to {c['questions']:,} questions, {c['accuracy']:.1%} right; "
        f"both right and wrong ones to {c['questions_with_right_and_wrong']:,} questions"
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
    settings = {name: value for name, value in result["settings"].items() if value not in (None, {})}
    lines += [", ".join(f"{name} {value}" for name, value in settings.items()), ""]
    lines += [f"- {line}" for line in counts(result)] + [""]
    lines += [_line(HEADER), _line(["---"] * len(HEADER)), *map(_line, rows(result)), ""]
    lines += ["    " * line.startswith(" ") + f"- {line.strip()}" for line in verdict(result)] + [""]
    lines += [_LEGEND, "", "versions: " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()), ""]
    return "\n".join(lines)


_LEGEND = """\
Every signal is turned so that higher means more likely right (perplexity, entropy, bits per byte and length are
negated). AUROC: over all responses. Pairs: share of the pairs of a right and a wrong response to one question that
are in order, which is what a reward needs. Best of N: accuracy of the response with the highest value. AURC: mean
error rate over all coverages, lower is better. Brier skill and ECE: by Platt's method, fitted on other questions.
Intervals resample questions. `answer_` is the answer alone, given the response before it."""


def _row(name: str, s: Mapping[str, Any]) -> tuple[str, ...]:
    calibration = s["calibration"] or {"brier_skill": None, "ece": None}
    return (
        name,
        f"{_fixed(s['auroc'])} {_interval(s['auroc_interval'])}".strip(),
        f"{_percent(s['pair_accuracy'])} {_interval(s['pair_accuracy_interval'], percent=True)}".strip(),
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


def _interval(bounds: Sequence[float] | None, percent: bool = False, sign: str = "") -> str:
    if bounds is None:
        return ""
    return "[" + ", ".join(f"{100 * b:.1f}" if percent else f"{b:{sign}.3f}" for b in bounds) + "]"
