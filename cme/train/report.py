"""The end of a run for a person: a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cme.evaluation.held_out import METRICS, Answer, change
from cme.evaluation.report import Table, decimal, percent, picture

_NAMES = {"reward": "verifier_logprob"}  # whatever was rewarded
_SHARES = {m for m in METRICS if m.startswith("accuracy") or m.endswith("rate")}


def table(before: Sequence[Answer], after: Sequence[Answer]) -> str:
    """Before, after and their difference with its 95 % interval, a line per metric."""
    asked = len({answer.question for answer in (*before, *after)})
    rows = []
    for metric in METRICS:
        if (found := change(before, after, metric)) is None:
            continue
        show = percent if metric in _SHARES else decimal
        low, high = (show(bound, "+") for bound in found.interval)
        fewer = "" if found.questions == asked else f"{found.questions} of {asked} questions have it both times"
        values = (show(found.before), show(found.after), show(found.after - found.before, "+"))
        rows.append([_NAMES.get(metric, metric), *values, f"[{low}, {high}]", fewer])
    return Table(["held out", "before", "after", "change", "95 % interval", ""], rows).plain()


def differences(before: Sequence[Answer], after: Sequence[Answer]) -> dict[str, Any]:
    """For each metric the change of its mean and the 95 % interval, over the questions that have it both times."""
    found = {metric: change(before, after, metric) for metric in METRICS}
    return {
        metric: {"change": c.after - c.before, "interval_95": c.interval, "questions": c.questions}
        for metric, c in found.items()
        if c is not None
    }


_PANELS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("verifier's log-likelihood (nats/token)", ("rewards/cme/mean", "cme/canary"), ("reward",)),
    ("accuracy", ("cme/accuracy",), ("accuracy_sampled", "accuracy_greedy")),
    ("response length (tokens)", ("completions/mean_length",), ("mean_length",)),
    ("what is rewarded", ("reward",), ()),
    ("policy's entropy and KL to its start (nats/token)", ("entropy", "kl"), ()),
    ("signs of a gamed reward", ("cme/prompt_copy_rate", "cme/echo_rate", "cme/repeated_4gram_rate"), ()),
)
"""Title, what is logged while training, and what of the held-out answers belongs to it."""

_LABELS = {
    "rewards/cme/mean": "training prompts",
    "cme/accuracy": "training prompts, sampled",
    "completions/mean_length": "training prompts",
    "accuracy_sampled": "held out, sampled",
    "accuracy_greedy": "held out, greedy",
}


def draw(
    history: Sequence[Mapping[str, Any]],
    before: Mapping[str, float | None] | None,
    after: Mapping[str, float | None] | None,
    path: Path,
    alarms: Sequence[Mapping[str, Any]] = (),
) -> None:
    """The numbers of a run over its steps, and where alarms (of alarms.jsonl) fired, to a PNG."""
    last_step = max((record["step"] for record in history), default=0)
    with picture(path, 13, 6.5) as figure:
        panels = figure.subplots(2, 3, sharex=True)
        for axes, (title, logged, held_out) in zip(panels.flat, _PANELS, strict=True):
            for name in logged:
                points = [(r["step"], r[name]) for r in history if r.get(name) is not None]
                _plot(axes, points, _LABELS.get(name, name.removeprefix("cme/").replace("_", " ")), ".-")
            for name in held_out:
                ends = [(s, e[name]) for s, e in ((0, before), (last_step, after)) if e and e[name] is not None]
                _plot(axes, ends, _LABELS.get(name, "held out"), "s--")
            for color, alarm in enumerate(alarms):
                label = f"alarm {alarm['rule']}" if axes is panels[1, 1] else None
                axes.axvline(alarm["step"], color=f"C{color + 3}", linestyle=":", label=label)
            axes.set_title(title, fontsize=10)
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8)
        for axes in panels[1]:
            axes.set_xlabel("step")


def _plot(axes: Any, points: Sequence[tuple[Any, Any]], label: str, style: str) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), style, label=label)


def stopping_alarm(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """The alarm at which a run ended; one that it was resumed past is not."""
    last = summary["steps"]
    return next((a for a in summary["alarms"] if a["action"] != "warn" and a["step"] == last), None)


def closing_words(
    summary: Mapping[str, Any], before: Sequence[Answer] | None, after: Sequence[Answer] | None, folder: Path
) -> str:
    """The last output of a run: its table, the alarm that stopped it, its duration and its files."""
    parts = [table(before, after)] if before and after else []
    if (stop := stopping_alarm(summary)) is not None:
        model = f"model/ is that of step {summary['model_step']}"
        parts.append(f"stopped by the alarm {stop['rule']} at step {stop['step']}; {model}")
    rest = ("summary.json", "training.png", "completions/", "evaluation/")
    holds = ", ".join(name for name in rest if (folder / name).exists())
    parts.append(
        f"{summary['steps']} steps in {summary['seconds']:.0f} s. {folder} holds metrics.jsonl,\n"
        f"{holds} and the trained model in model/."
    )
    return "".join(f"\n{part}\n" for part in parts)
