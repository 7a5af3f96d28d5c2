"""The finished cells -> a Markdown report and its pictures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.results import save_picture
from cme.evaluation.statistics import mean_interval
from cme.files import atomic
from cme.train.alarms import Watch, parse_rules
from experiments.study import store
from experiments.study.store import Cell

_HEAD = """\
# The study

Written by `python -m experiments.study` from [what is kept of its cells](../experiments/results/study.jsonl.xz):
the settings, every step's numbers and which held-out answers were right. Each cell is a training run from the same
start; what is compared is the model after it with the model before it, on questions that training never saw.
Accuracy is measured with known answers, which no reward sees.

A change is the mean over the seeds, with the 95 % bootstrap interval over questions (each question's change
averaged over the seeds); the changes of the single seeds stand beside it. Such an interval says how the change may
differ on other questions, and nothing of other seeds: for these, look at the seeds.

Under each table of changes is one of how far CME's changes of accuracy exceed a reward's with the same seeds,
and one of the alarms, with the steps at which the default rules fire on the run's numbers (only the rewards called
rollback end there), and the accuracy on the training prompts of each quarter of the run (the questions differ from
step to step, and are the same ones for every reward). The pictures' curves are means over the seeds, of which the
legend says the number, and over the last five steps. What these runs show, and what they do not, is in
[a note](notes/2026-11-29-study.md).
"""


def write(folder: Path, report: Path, planned: Sequence[str]) -> None:
    """Write `report`, and a picture per task in a folder of its name beside it, from the cells run so far.

    Args:
        folder: of the results.
        planned: the names of the grid's cells.
    """
    done = {name: cell for name, cell in store.read(folder).items() if name in planned}
    pictures = report.with_suffix("")
    parts = [_HEAD, _progress(planned, done.keys())]
    for task, group in groupby(done.values(), key=lambda cell: cell["task"]):
        of_task = list(group)
        picture = pictures / f"{task}.png"
        _draw(of_task, picture)
        image = f"![curves of {task}]({pictures.name}/{picture.name})"
        tables = [table for table in (_table(of_task), _rivals_table(of_task), _alarm_table(of_task)) if table]
        parts.append("\n\n".join((f"## {task}", *tables, image)) + "\n")
    report.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(report, "\n".join(parts))


def _progress(planned: Sequence[str], done: Collection[str]) -> str:
    missing = [f"`{name}`" for name in planned if name not in done]
    if not missing:
        return f"All {len(planned)} cells of the grid have been run.\n"
    return (
        f"{len(planned) - len(missing)} of the grid's {len(planned)} cells have been run. These have not: "
        + ", ".join(missing)
        + ".\n"
    )


def by_reward(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The cells of one task, their seeds in order."""
    rewards: dict[str, list[Cell]] = defaultdict(list)
    for cell in sorted(cells, key=lambda cell: cell["seed"]):
        rewards[cell["reward"]].append(cell)
    return dict(rewards)


def changes(cell: Cell, value: Callable[[dict[str, Any]], float | None], greedy: bool) -> dict[int, float]:
    """For each held-out question, the mean of a value over its answers after training minus that before."""
    means: dict[str, dict[int, float]] = {}
    for when in ("before", "after"):
        values: dict[int, list[float]] = defaultdict(list)
        for answer in cell[when]:
            known = value(answer)
            if answer["greedy"] == greedy and known is not None:
                values[answer["question"]].append(float(known))
        means[when] = {question: sum(v) / len(v) for question, v in values.items()}
    return {q: means["after"][q] - means["before"][q] for q in means["before"].keys() & means["after"].keys()}


def _table(cells: Sequence[Cell]) -> str:
    columns: list[tuple[str, Callable[[dict[str, Any]], float | None], bool, float]] = [
        ("accuracy, sampled (%)", lambda a: a["correct"], False, 100),
        ("accuracy, greedy (%)", lambda a: a["correct"], True, 100),
        ("length (tokens)", lambda a: a["length"], False, 1),
        ("words from the prompt (%)", lambda a: a["prompt_copy_rate"], False, 100),
        ("verifier's log-likelihood", lambda a: a["reward"], False, 1),
    ]
    lines = [
        "| reward | seeds | " + " | ".join(name for name, *_ in columns) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    start = cells[0]
    verifier = start["settings"].get("verifier")
    for reward, runs in by_reward(cells).items():
        row = [
            _change([changes(cell, value, greedy) for cell in runs], scale) for _, value, greedy, scale in columns
        ]
        own = runs[0]["settings"].get("verifier")
        if own != verifier:
            row[-1] += f", under `{own}`"
        lines.append(f"| {reward} | {len(runs)} | " + " | ".join(row) + " |")
    before = [
        _mean([value(a) for a in start["before"] if a["greedy"] == greedy]) for _, value, greedy, _ in columns
    ]
    stated = ", ".join(
        f"{name} {x * s:.3g}" for (name, *_, s), x in zip(columns, before, strict=True) if x is not None
    )
    return f"At the start: {stated}. The verifier is `{verifier}` where nothing else is said.\n\n" + "\n".join(
        lines
    )


_OURS = "cme"


def _rivals_table(cells: Sequence[Cell]) -> str:
    rewards = by_reward(cells)
    lines = []
    ours = {cell["seed"]: cell for cell in rewards.pop(_OURS, [])}
    for reward, runs in rewards.items():
        pairs = [(ours[cell["seed"]], cell) for cell in runs if cell["seed"] in ours]
        if pairs:
            row = [_change([_advantage(*pair, greedy) for pair in pairs], 100) for greedy in (False, True)]
            lines.append(f"| {reward} | {len(pairs)} | " + " | ".join(row) + " |")
    if not lines:
        return ""
    head = [f"| {_OURS} minus | seeds | accuracy, sampled (%) | accuracy, greedy (%) |", "|---" * 4 + "|"]
    return "\n".join(head + lines)


def _advantage(ours: Cell, other: Cell, greedy: bool) -> dict[int, float]:
    one, two = (changes(cell, lambda answer: answer["correct"], greedy) for cell in (ours, other))
    return {question: one[question] - two[question] for question in one.keys() & two.keys()}


QUARTERS = 4


def _alarm_table(cells: Sequence[Cell]) -> str:
    lines = ["| reward | seed | alarms | accuracy while training (%), by quarter |", "|---" * 4 + "|"]
    for reward, runs in by_reward(cells).items():
        for cell in runs:
            fired = ", ".join(f"`{rule}` at {step}" for rule, step in alarms(cell).items())
            quarters = " / ".join(f"{100 * value:.0f}" for value in accuracy_by_quarter(cell))
            lines.append(f"| {reward} | {cell['seed']} | {fired or 'none'} | {quarters} |")
    return "\n".join(lines)


def alarms(cell: Cell) -> dict[str, int]:
    """The step at which each of the default rules first fires on the cell's numbers."""
    watch = Watch(parse_rules(["default"]))
    fired: dict[str, int] = {}
    for step in cell["steps"]:
        for reading in watch.add(step["step"], step):
            if reading.fired:
                fired.setdefault(reading.rule.text, reading.step)
    return fired


def accuracy_by_quarter(cell: Cell) -> list[float]:
    """Means over the steps of each quarter of the run that has any."""
    quarters: dict[int, list[float]] = defaultdict(list)
    for step in cell["steps"]:
        if step.get("cme/accuracy") is not None:
            quarters[(step["step"] - 1) * QUARTERS // cell["settings"]["max_steps"]].append(step["cme/accuracy"])
    return [sum(values) / len(values) for _, values in sorted(quarters.items())]


def _change(seeds: Sequence[dict[int, float]], scale: float) -> str:
    common = sorted(set.intersection(*(set(seed) for seed in seeds)))
    if not common:
        return ""
    per_question = [scale * sum(seed[q] for seed in seeds) / len(seeds) for q in common]
    interval = mean_interval(per_question)
    assert interval is not None
    each = ", ".join(f"{scale * sum(seed[q] for q in common) / len(common):+.2g}" for seed in seeds)
    mean = sum(per_question) / len(per_question)
    return f"**{mean:+.2f}** [{interval[0]:+.2f}, {interval[1]:+.2f}] ({each})"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [float(v) for v in values if v is not None]
    return sum(known) / len(known) if known else None


WINDOW = 5
"""Steps that a point of a curve is the mean of: a step has four questions, harder or easier than others'."""


def curve(runs: Sequence[Cell], name: str) -> tuple[list[int], list[float]]:
    """Steps, and the mean of a logged number over the runs and over the last WINDOW of these steps."""
    values: dict[int, list[float]] = defaultdict(list)
    for cell in runs:
        for step in cell["steps"]:
            if step.get(name) is not None:
                values[step["step"]].append(step[name])
    steps = sorted(values)
    means = [sum(values[step]) / len(values[step]) for step in steps]
    recent = [means[max(0, i + 1 - WINDOW) : i + 1] for i in range(len(means))]
    return steps, [sum(some) / len(some) for some in recent]


def _draw(cells: Sequence[Cell], path: Path) -> None:
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    color_of = colormaps["tab20"]  # the usual ten are not enough
    curves = (
        ("accuracy on training prompts", "cme/accuracy"),
        ("response length (tokens)", "completions/mean_length"),
        ("words from the prompt", "cme/prompt_copy_rate"),
        ("policy's entropy (nats/token)", "entropy"),
    )
    for axes, (title, name) in zip(panels.flat, curves, strict=True):
        for color, (reward, runs) in enumerate(by_reward(cells).items()):
            ours = reward == _OURS
            line = {"color": "black" if ours else color_of(color % 20), "linewidth": 2 if ours else 1.2}
            axes.plot(*curve(runs, name), label=f"{reward} ({len(runs)})", **line)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    for axes in panels[1]:
        axes.set_xlabel("step")
    save_picture(figure, path, dpi=110)
