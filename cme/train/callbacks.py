"""Callbacks that show and record a run while it trains: a progress bar, metrics.jsonl, sealed checkpoints."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import rotate_checkpoints

from cme.errors import CMEError
from cme.train.folder import RunFolder, seal

SHOWN = {
    "rewards/cme/mean": "reward",
    "cme/accuracy": "accuracy",
    "completions/mean_length": "length",
    "cme/prompt_copy_rate": "copied",
    "cme/repeated_4gram_rate": "repeated",
    "cme/canary": "canary",
}
"""Metrics beside the progress bar, by their short names."""


class Progress(ProgressCallback):
    """A bar over optimizer steps, with the time left and the latest metrics beside it."""

    training_bar: Any

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.current_step = state.global_step  # those of a resumed run are behind it, and count for no speed
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", unit="step"
            )

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        shown = {SHOWN[k]: f"{v:.3g}" for k, v in (logs or {}).items() if k in SHOWN and v is not None}
        if self.training_bar is not None and shown:
            self.training_bar.set_postfix(shown)


class Recorder(TrainerCallback):
    """Writes each logged step to metrics.jsonl, and stops a run whose numbers have become NaN.

    `start` is when the run began, on the clock of `time.monotonic`: before this process by what sessions before it
    took. A line's `seconds` are those since then.
    """

    def __init__(self, folder: RunFolder, start: float) -> None:
        self._folder = folder
        self._start = start

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs:  # the trainer's closing line has only totals
            return
        self._stop_if_not_finite(logs, state.global_step)
        if state.is_world_process_zero:
            numbers = {k: v for k, v in logs.items() if isinstance(v, int | float)}
            seconds = round(time.monotonic() - self._start, 3)
            self._folder.metrics.append({"step": state.global_step, "seconds": seconds, **numbers})

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
                    f"{remedy} with a lower --learning-rate or --max-grad-norm"
                )


class Checkpoints(TrainerCallback):
    """Seals each checkpoint, and then deletes the oldest beyond a limit (None for no limit).

    The trainer itself must have no limit: it would delete the last complete one before the new one is sealed.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()  # each process writes files of its own
        if state.is_world_process_zero:
            folder, step = str(args.output_dir), state.global_step
            seal(Path(folder) / f"checkpoint-{step}", step)
            rotate_checkpoints(folder, self._limit, state.best_model_checkpoint, use_mtime=True)


def add_callbacks(trainer: Trainer, folder: RunFolder, alarms: TrainerCallback, start: float) -> None:
    """Have a run shown, recorded, sealed and watched."""
    args: Any = trainer.args
    limit, args.save_total_limit = args.save_total_limit, None
    for callback in (Recorder(folder, start), Checkpoints(limit), alarms):
        trainer.add_callback(callback)
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress())
