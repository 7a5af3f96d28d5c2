"""What a training run shows and records while it runs, and what stops it."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from cme.errors import CMEError
from cme.train.alarms import Reading, Rule, Watch, require_logged
from cme.train.checkpoints import damage, link_weights, seal, sealed_step
from cme.train.folder import RunFolder

SHOWN = {
    "rewards/cme/mean": "reward",
    "cme/accuracy": "accuracy",
    "completions/mean_length": "length",
    "cme/prompt_copy_rate": "copied",
    "cme/repeated_4gram_rate": "repeated",
    "cme/canary": "canary",
}
"""Metrics beside the progress bar, by their short names."""


class Progress(TrainerCallback):
    """A progress bar over optimizer steps, with the time left and the latest metrics."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._bar is not None and logs:
            shown = {SHOWN[k]: f"{v:.3g}" for k, v in logs.items() if k in SHOWN and v is not None}
            if shown:
                self._bar.set_postfix(shown)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()


class Recorder(TrainerCallback):
    """Writes each logged step to metrics.jsonl, and stops a run whose numbers have become NaN."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._start = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:  # the trainer's closing line has only totals
            return
        self._stop_if_not_finite(logs, state.global_step)
        if state.is_world_process_zero:
            numbers = {k: v for k, v in logs.items() if isinstance(v, int | float)}
            seconds = round(time.monotonic() - self._start, 3)
            self._folder.log({"step": state.global_step, "seconds": seconds, **numbers})

    def _stop_if_not_finite(self, logs: dict[str, Any], step: int) -> None:
        for name in ("loss", "grad_norm"):
            value = logs.get(name)
            if value is not None and not math.isfinite(float(value)):
                checkpoint = self._folder.newest_checkpoint()
                remedy = (
                    "no checkpoint had been written yet: start again"
                    if checkpoint is None
                    else f"the last good checkpoint is {checkpoint}: resume from it"
                )
                raise CMEError(
                    f"{name} became {value} at step {step}, so the model's weights are no longer usable; "
                    f"{remedy} with a lower --learning_rate or --max_grad_norm"
                )


class Checkpoints(TrainerCallback):
    """Seals each checkpoint, and then deletes the oldest beyond a limit (None for no limit).

    The trainer itself must have no limit: it would delete the last complete one before the new one is sealed.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        PartialState().wait_for_everyone()  # each process writes files of its own
        if state.is_world_process_zero:
            folder, step = str(args.output_dir), state.global_step
            seal(Path(folder) / f"checkpoint-{step}", step)
            rotate_checkpoints(folder, self._limit, state.best_model_checkpoint, use_mtime=True)


class Alarms(TrainerCallback):
    """Watches rules over the logged numbers; records what fires in alarms.jsonl, and stops the run.

    With the action "rollback" it keeps in best/ the weights of the newest checkpoint at which every rule was at
    most half its way from the start to its limit; until there is one, those of the start.

    Attributes:
        resumed_from: the checkpoint that the run goes on from, in its own folder or in another's.
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
        self._strain: dict[Rule, float] = {}  # the last of each: a step may lack a metric
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
        """What alarms.jsonl holds."""
        return list(self._folder.alarms)

    def keep_start(self, save: Callable[[str], object], is_main: bool = True) -> None:
        """Save the weights of the start, with `save(folder)`, unless `best` holds those of a step that a run which
        goes on has behind it. Every process calls it; the main one makes files."""
        resumed = None if self.resumed_from is None else sealed_step(self.resumed_from)
        best = self.best_step
        if resumed is not None and best is not None and best <= resumed and damage(self.best) is None:
            return
        if is_main:
            self.forget_best()
        save(str(self.best))
        if is_main:
            seal(self.best, 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._folder.alarms.replace([r for r in self.history() if r["step"] <= state.global_step])
        for record in self._folder.history():  # of a run that is resumed
            if record["step"] <= state.global_step:
                fired = self._read(record["step"], record)
                if record["step"] == state.global_step:  # the run was stopped here
                    self._fire(fired, state, control)
        if self.resumed_from is not None and state.is_world_process_zero:
            self._keep_if_clean(self.resumed_from, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        if not self._checked:  # later steps may lack a metric, where no response can be scored
            require_logged(self._given, logs)
            self._checked = True
        self._fire(self._read(state.global_step, logs), state, control)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            step = state.global_step
            self._keep_if_clean(self._folder.path / f"checkpoint-{step}", step)

    def _read(self, step: int, logs: dict[str, Any]) -> list[Reading]:
        """The alarms of a step: a rule that does no more than warn does so once."""
        readings = self._watch.add(step, logs)
        self._strain.update((reading.rule, reading.strain) for reading in readings)
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
        if self.rolls_back and self.best_step != step and max(self._strain.values(), default=0.0) <= self.CLEAN:
            link_weights(checkpoint, self.best)
