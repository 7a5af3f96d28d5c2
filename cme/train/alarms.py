"""Alarms of training that need no labels: rules over logged numbers, compared with the start of the run."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cme.errors import CMEError

DEFAULT_RULES = (
    "echo_rate>start+0.2",
    "prompt_copy_rate>start+0.3",
    "repeated_4gram_rate>start+0.2",
    "entropy<start*0.25",
    "canary_gap>start+1",
    "canary<start-1",
)
"""Chosen with the demo's and the study's runs in view; docs/training.md says what they miss there."""

_RULE = re.compile(r"\s*([\w/]+)\s*([<>])\s*(start\s*([+*-]))?\s*(-?[\d.]+(?:e-?\d+)?)\s*", re.IGNORECASE)
_HINTS = {
    "kl": "kl is logged with --beta above 0, and 1e-9 penalises nothing",
    "canary": "canary is logged with --canary",
}


@dataclass(frozen=True)
class Rule:
    """`METRIC>LIMIT` or `METRIC<LIMIT`; the limit is a number, or start+X, start-X or start*X.

    Attributes:
        text: as it was written.
        metric: a logged name, or one without its `cme/`.
        above: fires above the limit, not below it.
        relation: "+", "-" or "*" to the start's value; None for a limit that is a number.
    """

    text: str
    metric: str
    above: bool
    relation: str | None
    number: float

    @staticmethod
    def parse(text: str) -> Rule:
        """Raises CMEError if `text` is no rule."""
        match = _RULE.fullmatch(text)
        try:
            if match is None:
                raise ValueError
            metric, sign, _, relation, number = match.groups()
            return Rule(text.strip(), metric, sign == ">", relation, float(number))
        except ValueError as error:
            raise CMEError(
                f"{text!r} is not a rule: write METRIC>NUMBER or METRIC<NUMBER, or a limit relative to the "
                "start, such as 'prompt_copy_rate>start+0.3' or 'entropy<start*0.25' (in quotes: > is special to "
                "the shell)"
            ) from error

    def limit(self, start: float) -> float:
        """The value beyond which it fires, given the metric's at the start."""
        if self.relation == "*":
            return start * self.number
        if self.relation is None:
            return self.number
        return start + self.number if self.relation == "+" else start - self.number

    def read(self, logs: Mapping[str, Any]) -> float | None:
        """The metric in a logged step; None if it is not there, or not finite."""
        value = next((logs[name] for name in (self.metric, f"cme/{self.metric}") if name in logs), None)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def parse_rules(texts: Sequence[str]) -> tuple[Rule, ...]:
    """Rules as they are given to --stop_when, where "default" stands for DEFAULT_RULES. Raises CMEError."""
    each = (rule for text in texts for rule in (DEFAULT_RULES if text.strip() == "default" else (text,)))
    return tuple(dict.fromkeys(Rule.parse(rule) for rule in each))


@dataclass(frozen=True)
class Reading:
    """A rule after a step.

    Attributes:
        value: mean of the metric over the window.
        start: its mean over the first window of the run.
        limit: what the value is compared with.
        fired: it is beyond the limit.
    """

    step: int
    rule: Rule
    value: float
    start: float
    limit: float
    fired: bool

    @property
    def strain(self) -> float:
        """How far the way from the start to the limit is gone: 0 at the start, 1 where it fires."""
        if self.fired:
            return 1.0
        distance = (self.limit - self.start) if self.rule.above else (self.start - self.limit)
        moved = (self.value - self.start) if self.rule.above else (self.start - self.value)
        return min(max(moved / distance, 0.0), 1.0) if distance > 0 else 0.0


class Watch:
    """Means of the rules' metrics over the last `window` logged steps, against those over the first `window`.

    A rule is silent until there are as many values.
    """

    def __init__(self, rules: Sequence[Rule], window: int = 3) -> None:
        """Raises CMEError for a window below 1."""
        if window < 1:
            raise CMEError(f"the window of the alarms must be at least 1 logged step, not {window}")
        self.rules = rules
        self.window = window
        self._values: dict[Rule, list[float]] = defaultdict(list)
        self._start: dict[Rule, float] = {}

    def add(self, step: int, logs: Mapping[str, Any]) -> list[Reading]:
        """The readings of the rules that have one after this logged step."""
        readings = [self._add(rule, step, rule.read(logs)) for rule in self.rules]
        return [reading for reading in readings if reading is not None]

    def _add(self, rule: Rule, step: int, new: float | None) -> Reading | None:
        if new is None:
            return None
        values = self._values[rule]
        values.append(new)
        if len(values) < self.window:
            return None
        value = sum(values[-self.window :]) / self.window
        start = self._start.setdefault(rule, value)
        del values[: -self.window]
        limit = rule.limit(start)
        return Reading(step, rule, value, start, limit, value > limit if rule.above else value < limit)


def require_logged(rules: Sequence[Rule], logs: Mapping[str, Any]) -> None:
    """Raise CMEError if the run does not log the metric of a rule that its user gave."""
    for rule in rules:
        if rule.metric not in logs and f"cme/{rule.metric}" not in logs:
            hint = next((f" ({hint})" for name, hint in _HINTS.items() if rule.metric.startswith(name)), "")
            have = ", ".join(sorted(name.removeprefix("cme/") for name in logs))
            raise CMEError(
                f"the rule {rule.text!r} needs {rule.metric!r}, which is not logged{hint}; there are {have}"
            )
