"""The end of a run for a person: a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cme.evaluation.held_out import METRICS, Answer, change
from cme.files.atomic import replacing

_NAMES = {"reward": "verifier_logprob"}  # whatever was rewarded
_PERCENT = {m for m in METRICS if m.startswith("accuracy") or m.endswith("rate")}


def table(before: Sequence[Answer], after: Sequence[Answer]) -> str:
    """Before, after and their difference with its 95 % interval, a line per metric."""
    lines = [f"{'held out':<22}{'before':>9}{'after':>9}{'change':>9}  95 % interval"]
    asked = len({answer.question for answer in (*before, *after)})
    for metric in METRICS:
        found = change(before, after, metric)
        if found is None:
            continue
        low, high = (_format(metric, x, signed=True) for x in found.interval)
        of = "" if found.questions == asked else f"  {found.questions} of {asked} questions have it both times"
        lines.append(
            f"{_NAMES.get(metric, metric):<22}{_format(metric, found.before):>9}{_format(metric, found.after):>9}"
            f"{_format(metric, found.after - found.before, True):>9}  [{low}, {high}]{of}"
        )
    return "\n".join(lines)


def differences(before: Sequence[Answer], after: Sequence[Answer]) -> dict[str, Any]:
    """For each metric the change of its mean and the 95 % interval, over the questions that have it both times."""
    found = {metric: change(before, after, metric) for metric in METRICS}
    return {
        metric: {"change": c.after - c.before, "interval_95": c.interval, "questions": c.questions}
        for metric, c in found.items()
        if c is not None
    }


def _format(metric: str, value: float, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.1f} %" if metric in _PERCENT else f"{value:{sign}.2f}"


_PANELS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("verifier's log-likelihood (nats/token)", ("rewards/cme/mean", "cme/canary"), ("reward",)),
    ("accuracy", ("cme/accuracy",), ("accuracy_sampled", "accuracy_greedy")),
    ("response length (tokens)", ("completions/mean_length",), ("mean_length",)),
    ("what is rewarded", ("reward",), ()),
    ("policy's entropy and KL to its start (nats/token)", ("entropy", "kl"), ()),
    ("signs of a gamed reward", ("cme/prompt_copy_rate", "cme/echo_rate", "cme/repeated_4gram_rate"), ()),
)
"""Title, what is logged while training, and what of the held-out answers belongs to it."""

_HELD_OUT = {"accuracy_sampled": "held out, sampled", "accuracy_greedy": "held out, greedy"}


def draw(
    history: Sequence[Mapping[str, Any]],
    before: Mapping[str, float | None] | None,
    after: Mapping[str, float | None] | None,
    path: Path,
    alarms: Sequence[Mapping[str, Any]] = (),
) -> None:
    """The numbers of a run over its steps, and where alarms (of alarms.jsonl) fired, to a PNG."""
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(13, 6.5), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True)
    last_step = max((record["step"] for record in history), default=0)
    for axes, (title, logged, held_out) in zip(panels.flat, _PANELS, strict=True):
        for name in logged:
            points = [(r["step"], r[name]) for r in history if r.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=_label(name))
        for name in held_out:
            ends = [(s, e[name]) for s, e in ((0, before), (last_step, after)) if e and e[name] is not None]
            if ends:
                axes.plot(*zip(*ends, strict=True), "s--", label=_HELD_OUT.get(name, "held out"))
        for color, alarm in enumerate(alarms):
            label = f"alarm {alarm['rule']}" if axes is panels[1, 1] else None
            axes.axvline(alarm["step"], color=f"C{color + 3}", linestyle=":", label=label)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    for axes in panels[1]:
        axes.set_xlabel("step")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _label(name: str) -> str:
    known = {
        "rewards/cme/mean": "training prompts",
        "cme/accuracy": "training prompts, sampled",
        "completions/mean_length": "training prompts",
    }
    return known.get(name, name.removeprefix("cme/").replace("_", " "))


def closing_words(
    summary: Mapping[str, Any], before: Sequence[Answer] | None, after: Sequence[Answer] | None, folder: Path
) -> str:
    """What a run says at its end."""
    parts = [table(before, after)] if before and after else []
    if stops := [alarm for alarm in summary["alarms"] if alarm["action"] != "warn"]:
        stop = stops[-1]
        model = f"model/ is that of step {summary['model_step']}"
        parts.append(f"stopped by the alarm {stop['rule']} at step {stop['step']}; {model}")
    rest = ("summary.json", "training.png", "completions/", "evaluation/")
    holds = ", ".join(name for name in rest if (folder / name).exists())
    parts.append(
        f"{summary['steps']} steps in {summary['seconds']:.0f} s. {folder} holds metrics.jsonl,\n"
        f"{holds} and the trained model in model/."
    )
    return "".join(f"\n{part}\n" for part in parts)
