"""A run's folder: what is in it, how it survives a kill, where to continue.

metrics.jsonl       one line a logged step
completions/        a Parquet file a logged step: prompts, completions, rewards, diagnostics
evaluation/         before.json, after.json: held-out answers with their scores
checkpoint-N/       to resume from, once `cme.train.checkpoints` has sealed it
alarms.jsonl        which alarm fired when; best/ is what a rollback takes
model/              the trained model
training.png
summary.json        written last: a run with one is finished
.cme-lock           held while a process is in the folder
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from cme.errors import CMEError
from cme.evaluation.held_out import Answer, to_dicts
from cme.files.atomic import LOCK, locked_folder, write_text
from cme.files.journal import Journal
from cme.train.checkpoints import damage, lacks_optimizer, sealed_step

_END = ("max_steps", "num_train_epochs", "stop_when", "on_alarm")
"""Settings by which a run ends."""

_MUST_MATCH = (
    "generator",
    "chat_template_kwargs",
    "lora",
    "canary",
    "verifier",
    "verifier_template",
    "verifier_chat_template_kwargs",
    "score_end_of_turn",
    "score_thoughts",
    "reward",
    "dataset",
    "dataset_sha256",
    "seed",
    "completions_per_step",
    "num_generations",
    "max_completion_length",
    "sampling",
    "learning_rate",  # a schedule continues with the rate that is in the checkpoint, whatever is asked for
    "lr_scheduler_type",
    "beta",
    "loss_type",
)


class RunFolder:
    """Files are written whole or not at all: to a temporary name first, then renamed. Journals grow by lines."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics = Journal(self.path / "metrics.jsonl")
        self.alarms = Journal(self.path / "alarms.jsonl")

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def picture(self) -> Path:
        return self.path / "training.png"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes out of the folder. Raises CMEError if one is in it, or it can't be written to."""
        return locked_folder(self.path)

    def start(self, settings: Mapping[str, Any], overwrite: bool) -> None:
        """Ready the folder for a new run. Raises CMEError if it holds a run that has come as far as to write
        something, unless `overwrite` deletes that."""
        if (self.path / "run.json").exists():
            if not overwrite and self._has_work():
                state = "a finished run" if self.summary.exists() else "a run that was interrupted"
                raise CMEError(
                    f"{self.path} holds {state}. Continue it with --resume_from_checkpoint latest, "
                    "write elsewhere with --output_dir, or delete it with --overwrite."
                )
            self._clear()
        self.write_json("run.json", settings)

    def _has_work(self) -> bool:
        return bool({path.name for path in self.path.iterdir()} - {"run.json", LOCK})

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise CMEError if the run in the folder was started with settings that a continuation can't change."""
        started = self._read_json("run.json")
        for name in _MUST_MATCH if started else ():
            if name in started and started[name] != settings[name]:
                raise CMEError(
                    f"{self.path} was started with {name} = {started[name]!r}, not {settings[name]!r}: "
                    "continue with the same, or start a new run in another --output_dir"
                )

    def finished(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """What summary.json holds, if the run has come to the end that `settings` ask for."""
        summary: dict[str, Any] | None = self._read_json("summary.json")
        if summary is None:
            return None
        same_end = all(summary["settings"].get(name) == settings[name] for name in _END)
        return summary if same_end or 0 < settings["max_steps"] <= summary["steps"] else None

    def resume(self, settings: Mapping[str, Any], checkpoint: str) -> Path | None:
        """The checkpoint to continue from, the run's later steps forgotten; None if there is none, so all of them.

        `checkpoint` is "latest" or a checkpoint's folder. Raises CMEError if that is not whole, or has later ones
        beside it.
        """
        found = self._newest_whole() if is_latest(checkpoint) else self._given(Path(checkpoint))
        step = 0 if found is None else sealed_step(found) or 0
        if not (self.path / "run.json").exists():
            self.write_json("run.json", settings)
        self.summary.unlink(missing_ok=True)
        self.metrics.replace([record for record in self.metrics if record["step"] <= step])  # later ones run again
        return found

    def newest_checkpoint(self) -> Path | None:
        """The complete checkpoint with the highest step."""
        return next((path for path in self._checkpoints() if _why_not(path) is None), None)

    def drop_weights(self) -> None:
        """Delete the trained model and every checkpoint: what is large, and not needed to read the run."""
        for folder in (self.model, self.best, *self.path.glob("checkpoint-*")):
            shutil.rmtree(folder, ignore_errors=True)

    def log(self, record: Mapping[str, Any]) -> None:
        self.metrics.append(record)

    def history(self) -> list[dict[str, Any]]:
        """The logged steps."""
        return list(self.metrics)

    def write_answers(self, name: str, answers: Sequence[Answer]) -> None:
        self.write_json(f"evaluation/{name}.json", to_dicts(answers))

    def read_answers(self, name: str) -> list[Answer] | None:
        stored = self._read_json(f"evaluation/{name}.json")
        return None if stored is None else [Answer(**record) for record in stored]

    def write_json(self, name: str, value: Any) -> None:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def _read_json(self, name: str) -> Any:
        path = self.path / name
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        except ValueError as error:
            raise CMEError(f"{path} is damaged ({error}): delete the run with --overwrite") from error

    def _checkpoints(self) -> list[Path]:
        """The newest first."""
        found = [path for path in self.path.glob("checkpoint-*") if path.name[11:].isdigit()]
        return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)

    def _newest_whole(self) -> Path | None:
        found = self._checkpoints()
        for path in found:
            reason = _why_not(path)
            if reason is None:
                return path
            print(f"{path} is passed over: {reason}", file=sys.stderr, flush=True)
        # A kill in the first save leaves one that is not sealed. Others took steps, which are not lost unasked
        if len(found) > 1 or self.model.exists() or any(sealed_step(path) is not None for path in found):
            raise CMEError(
                f"no checkpoint in {self.path} is complete: start from the weights of one with "
                "--model_name_or_path in another --output_dir, or anew with --overwrite"
            )
        return None

    def _given(self, checkpoint: Path) -> Path:
        if (reason := _why_not(checkpoint)) is not None:
            raise CMEError(
                f"{checkpoint} is not a complete checkpoint: {reason}. "
                "Use --resume_from_checkpoint latest to take the newest complete one."
            )
        step = sealed_step(checkpoint) or 0
        if later := [str(path) for path in self._checkpoints() if (sealed_step(path) or 0) > step]:
            raise CMEError(
                f"{', '.join(later)} would be mixed with the steps after {checkpoint}: continue with "
                "--resume_from_checkpoint latest, delete the later checkpoints, or give another --output_dir"
            )
        return checkpoint

    def _clear(self) -> None:
        # run.json last: what a kill leaves is still known as a run
        held = (self.path / name for name in (LOCK, "run.json"))
        for path in set(self.path.iterdir()) - set(held):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        (self.path / "run.json").unlink()


def is_latest(checkpoint: str) -> bool:
    """Whether what is given to --resume_from_checkpoint is the newest one of the run, and no folder."""
    return checkpoint.lower() in ("latest", "true")


def _why_not(checkpoint: Path) -> str | None:
    reason = damage(checkpoint)
    if reason is None and lacks_optimizer(checkpoint):
        reason = "it has no state of the optimizer (--save_only_model)"
    return reason
