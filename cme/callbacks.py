"""What a training run shows and records while it runs."""

from __future__ import annotations

import math
import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cme.errors import CMEError
from cme.run_folder import RunFolder

SHOWN = {
    "rewards/cme/mean": "reward",
    "cme/accuracy": "accuracy",
    "completions/mean_length": "length",
    "cme/prompt_copy_rate": "copied",
    "cme/repeated_4gram_rate": "repeated",
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
