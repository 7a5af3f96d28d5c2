"""Alarms of training that need no labels: rules over logged numbers, compared with the start of the run, and the
callback that stops the run by them."""

from __future__ import annotations

import math
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState

from cme.errors import CMEError
from cme.train.config import DEFAULT_RULES, CMEConfig
from cme.train.folder import RunFolder, damage, link_weights, seal, sealed_step

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
    """Rules as they are given to --stop-when, where "default" stands for DEFAULT_RULES. Raises CMEError."""
    each = (rule for text in texts for rule in (DEFAULT_RULES if text.strip() == "default" else (text,)))
    return tuple(dict.fromkeys(Rule.parse(rule) for rule in each))


@dataclass(frozen=True)
class Reading:
    """A rule's numbers after a logged step.

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
    def fraction(self) -> float:
        """The part of the way from the start to the limit: 0 at the start, 1 where it fires."""
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


class Alarms(TrainerCallback):
    """Watches rules over the logged numbers; records what fires in alarms.jsonl, and stops the run.

    With the action "rollback" it keeps in best/ the weights of the newest checkpoint at which every rule was at
    most half its way from the start to its limit; until there is one, those of the start.

    Attributes:
        resumed_from: the checkpoint that the run continues from, in its own folder or in another's.
        stopped: the alarm that stopped the run.
    """

    CLEAN = 0.5

    def __init__(self, folder: RunFolder, watch: Watch, action: str, given: Sequence[Rule] = ()) -> None:
        """
        Args:
            action: "warn", "stop" or "rollback".
            given: rules of the user's own, whose metrics must be logged.
        """
        self._folder = folder
        self._watch = watch
        self._action = action
        self._given = given
        self._warned: set[Rule] = set()
        self._fractions: dict[Rule, float] = {}  # the last of each: a step may lack a metric
        self._checked = False
        self.resumed_from: Path | None = None
        self.stopped: Reading | None = None

    @property
    def rolls_back(self) -> bool:
        return self._action == "rollback"

    @property
    def best(self) -> Path:
        """Weights to go back to."""
        return self._folder.best

    @property
    def best_step(self) -> int | None:
        """The step of the weights in `best`; None if there are none."""
        return sealed_step(self.best)

    def forget_best(self) -> None:
        """Delete `best`, once the run has its model."""
        shutil.rmtree(self.best, ignore_errors=True)

    def history(self) -> list[dict[str, Any]]:
        """The lines of alarms.jsonl."""
        return list(self._folder.alarms)

    def kept_weights(self) -> Path | None:
        """Those to roll back to, for a run that an alarm has stopped; None for the last ones."""
        return self.best if self.rolls_back and self.stopped is not None and self.best_step is not None else None

    def keep_start(self, save: Callable[[str], object], is_main: bool = True) -> None:
        """Save the weights of the start, with `save(folder)`, unless `best` holds those of a step that the
        checkpoint has behind it. Every process calls it; the main one makes files."""
        resumed = None if self.resumed_from is None else sealed_step(self.resumed_from)
        best = self.best_step
        if resumed is not None and best is not None and best <= resumed and damage(self.best) is None:
            return
        if is_main:
            self.forget_best()
        save(str(self.best))
        if is_main:
            seal(self.best, 0)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._folder.alarms.replace([r for r in self.history() if r["step"] <= state.global_step])
        for record in self._folder.history():  # of a run that is resumed
            if record["step"] <= state.global_step:
                fired = self._read(record["step"], record)
                if record["step"] == state.global_step:  # the run was stopped here
                    self._fire(fired, state, control)
        if self.resumed_from is not None and state.is_world_process_zero:
            self._keep_if_clean(self.resumed_from, state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        if not self._checked:  # later steps may lack a metric, where no response can be scored
            require_logged(self._given, logs)
            self._checked = True
        self._fire(self._read(state.global_step, logs), state, control)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            step = state.global_step
            self._keep_if_clean(self._folder.path / f"checkpoint-{step}", step)

    def _read(self, step: int, logs: dict[str, Any]) -> list[Reading]:
        """The alarms of a step. A rule that only warns does so once."""
        readings = self._watch.add(step, logs)
        self._fractions.update((reading.rule, reading.fraction) for reading in readings)
        fired = [reading for reading in readings if reading.fired and reading.rule not in self._warned]
        if self._action == "warn":
            self._warned |= {reading.rule for reading in fired}
        return fired

    def _fire(self, readings: Sequence[Reading], state: TrainerState, control: TrainerControl) -> None:
        for reading in readings:
            if state.is_world_process_zero:
                self._record(reading)
            if self._action != "warn" and self.stopped is None:
                self.stopped = reading
                control.should_training_stop = True

    def _record(self, reading: Reading) -> None:
        if any((r["step"], r["rule"]) == (reading.step, reading.rule.text) for r in self.history()):
            return  # a run that was stopped here is resumed
        kept = {"kept_step": self.best_step} if self.rolls_back else {}
        record = {
            "step": reading.step,
            "rule": reading.rule.text,
            "value": reading.value,
            "start": reading.start,
            "limit": reading.limit,
            "action": self._action,
            **kept,
        }
        self._folder.alarms.append(record)
        tqdm.write(
            f"alarm at step {reading.step}: {reading.rule.text} ({reading.value:.3g} over the last "
            f"{self._watch.window} logged steps, {reading.start:.3g} at the start)"
        )

    def _keep_if_clean(self, checkpoint: Path, step: int) -> None:
        if self.rolls_back and self.best_step != step and max(self._fractions.values(), default=0.0) <= self.CLEAN:
            link_weights(checkpoint, self.best)


def build_alarms(cme: CMEConfig, folder: RunFolder, can_roll_back: bool) -> Alarms:
    """The alarms that the options ask for, none with --on-alarm off. Raises CMEError for what is no rule."""
    rules = parse_rules(cme.stop_when)
    given = parse_rules([text for text in cme.stop_when if text.strip() != "default"])
    if cme.on_alarm == "off":
        rules = given = ()
    action = "stop" if cme.on_alarm == "rollback" and not can_roll_back else cme.on_alarm
    return Alarms(folder, Watch(rules, cme.alarm_window), action if rules else "off", given)
