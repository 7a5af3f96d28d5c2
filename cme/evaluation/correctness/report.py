"""A run's numbers as text and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cme.evaluation.correctness.signals import ANSWER_HEADLINE, HEADLINE, MIN_QUESTIONS
from cme.evaluation.report import Table, decimal, draw_intervals, picture, with_interval

_HEADER = ("signal", "AUROC [95 %]", "pairs [95 %]", "best of N [95 %]", "AURC", "Brier skill", "ECE")
_LEGEND = """\
Every signal is turned so that higher means more likely right (entropy, bits per byte and length are negated).
AUROC: over all responses. Pairs: share of the pairs of a right and a wrong response to one question that are in
order, which is what a reward needs. Best of N: accuracy of the response with the highest value. AURC: mean error
rate over all coverages, lower is better. Brier skill and ECE: by Platt's method, fitted on other questions.
Intervals resample questions. `answer_` is the answer alone, given the response before it."""


def verdict(result: Mapping[str, Any]) -> list[str]:
    """Sentences on the verifier's likelihood, of the response and of the answer, against chance and its controls.
    That it is this signal which is judged was fixed beforehand."""
    names = [name for name in (HEADLINE, ANSWER_HEADLINE) if name in result["signals"]]
    return [line for name in names for line in _verdict_on(name, result)]


def _verdict_on(name: str, result: Mapping[str, Any]) -> list[str]:
    signal, c = result["signals"][name], result["counts"]
    if signal["auroc"] is None:
        return [f"{name}: no verdict, AUROC is undefined"]
    few = min(c["questions_with_right"], c["questions_with_wrong"])
    area, interval = signal["auroc"], signal["auroc_interval"]
    lines = [f"{name}: AUROC {with_interval(area, interval)} against 0.5, {_state(interval, 0.5, few)}"]
    if signal["pair_accuracy"] is not None:
        pairs, interval = signal["pair_accuracy"], signal["pair_accuracy_interval"]
        state = _state(interval, 0.5, c["questions_with_right_and_wrong"])
        shown = with_interval(pairs, interval, share=True)
        lines.append(f"  right above wrong within a question: {shown} against 50 %, {state}")
    for other, control in result["signals"].items():
        below = control["auroc_below"]
        if control["control"] and below["reference"] == name:
            shown = with_interval(below["difference"], below["interval"], sign="+")
            lines.append(f"  AUROC above {other}: {shown}, {_state(below['interval'], 0, few)}")
    return lines


def _state(interval: Sequence[float] | None, reference: float, questions: int) -> str:
    """The meaning of an interval; none if it comes from too few questions, or there is none."""
    if questions < MIN_QUESTIONS:
        return f"undecided: {questions} questions are too few"
    if interval is None:
        return "undecided: no resample has right and wrong responses, raise --resamples"
    low, high = interval
    if low <= reference <= high:
        return "NOT shown to be better"
    return "better" if low > reference else "WORSE"


def _counts(result: Mapping[str, Any]) -> list[str]:
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


def _table(result: Mapping[str, Any]) -> Table:
    return Table(_HEADER, [_row(name, signal) for name, signal in result["signals"].items()])


def _row(name: str, s: Mapping[str, Any]) -> tuple[str, ...]:
    calibration = s["calibration"] or {"brier_skill": None, "ece": None}
    return (
        name,
        with_interval(s["auroc"], s["auroc_interval"]),
        with_interval(s["pair_accuracy"], s["pair_accuracy_interval"], share=True),
        with_interval(s["best_of_n"], s["best_of_n_interval"], share=True),
        decimal(s["risk_area"]),
        decimal(calibration["brier_skill"], sign="+"),
        decimal(calibration["ece"]),
    )


def plain(result: Mapping[str, Any]) -> str:
    """For a terminal."""
    return "\n".join([*_counts(result), "", _table(result).plain(), "", *verdict(result)])


def markdown(result: Mapping[str, Any]) -> str:
    settings = [f"{name} {value}" for name, value in result["settings"].items() if value not in (None, {})]
    judged = ["    " * line.startswith(" ") + f"- {line.strip()}" for line in verdict(result)]
    parts = [
        f"# Correctness: {result['about']}",
        ", ".join(settings),
        "\n".join(f"- {line}" for line in _counts(result)),
        _table(result).markdown(),
        "\n".join(judged),
        _LEGEND,
        "versions: " + ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
    ]
    return "\n\n".join(parts) + "\n"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """AUROC with intervals, accuracy against coverage, and reliability, to a PNG."""
    signals = result["signals"]
    with picture(path, 13, max(4.5, 1.5 + 0.27 * len(signals))) as figure:
        areas, coverage, reliability = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
        points = {name: (s["auroc"], s["auroc_interval"]) for name, s in signals.items()}
        draw_intervals(areas, points, 0.5, ["tab:gray" if s["control"] else "tab:blue" for s in signals.values()])
        areas.set_title("AUROC, 95 % interval over questions", fontsize=10)
        areas.set_xlabel("blue: the verifier; grey: controls; dotted: chance", fontsize=8)
        _draw_coverage(coverage, signals, result["counts"]["accuracy"])
        _draw_reliability(reliability, signals[HEADLINE]["calibration"])
        figure.suptitle(result["about"], fontsize=10)


def _draw_coverage(axes: Any, signals: Mapping[str, Any], accuracy: float) -> None:
    for name, signal in signals.items():
        if name == HEADLINE or (signal["control"] and "answer" not in name):
            curve = signal["selective_accuracy"]
            style = {"linewidth": 2.5} if name == HEADLINE else {"linewidth": 1, "linestyle": "--"}
            axes.plot([float(c) for c in curve], list(curve.values()), label=name, **style)
    axes.axhline(accuracy, color="black", linewidth=0.8, linestyle=":", label="all responses")
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
        axes.plot([b["probability"] for b in bins], [b["accuracy"] for b in bins], "o-", color="tab:blue")
    axes.set_title(f"reliability of {HEADLINE}", fontsize=10)
    axes.set_xlabel("probability of being right, fitted on other questions", fontsize=8)
    axes.set_ylabel("share that is right", fontsize=8)
    axes.grid(alpha=0.3)
