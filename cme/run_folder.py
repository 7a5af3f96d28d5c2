"""A run's folder: what is in it, how it survives a kill, where to continue.

metrics.jsonl       one line a logged step
completions/        a Parquet file a logged step: prompts, completions, rewards, diagnostics
evaluation/         before.json, after.json: held-out answers with their scores
checkpoint-N/       to resume from
alarms.jsonl        which alarm fired when; best/ is what a rollback takes
model/              the trained model
summary.json  training.png
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cme.errors import CMEError
from cme.evaluation.held_out import Answer, to_dicts
from cme.files import write_text

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
    "seed",
    "completions_per_step",
    "num_generations",
    "max_completion_length",
    "sampling",
)


class RunFolder:
    """Files are written whole or not at all: to a temporary name first, then renamed."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

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

    def start(self, settings: Mapping[str, Any], overwrite: bool) -> None:
        """Make the folder for a new run. Raises CMEError if it holds a run, unless `overwrite` deletes that."""
        if (self.path / "run.json").exists():
            if not overwrite:
                state = "a finished run" if self.summary.exists() else "a run that was interrupted"
                raise CMEError(
                    f"{self.path} holds {state}. Continue it with --resume_from_checkpoint latest, "
                    "write elsewhere with --output_dir, or delete it with --overwrite."
                )
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_json("run.json", settings)

    def resume(self, settings: Mapping[str, Any], checkpoint: str) -> Path | None:
        """The checkpoint to continue from; None if the run was stopped before it wrote one.

        `checkpoint` is "latest" or a checkpoint's folder. Raises CMEError if the run was started with settings
        that a continuation can't change, or if the checkpoint is not whole.
        """
        started = self._read_json("run.json")
        for name in _MUST_MATCH if started else ():
            if name in started and started[name] != settings[name]:
                raise CMEError(
                    f"{self.path} was started with {name} = {started[name]!r}, not {settings[name]!r}: "
                    "continue with the same, or start a new run in another --output_dir"
                )
        if started is None:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_json("run.json", settings)
        if checkpoint.lower() in ("latest", "true"):
            found = self.newest_checkpoint()
        else:
            found = Path(checkpoint)
            if not is_complete(found):
                raise CMEError(
                    f"{found} is not a complete checkpoint: its trainer_state.json is missing or broken. "
                    "Use --resume_from_checkpoint latest to take the newest complete one."
                )
        self._forget_after(0 if found is None else step_of(found))
        return found

    def newest_checkpoint(self) -> Path | None:
        """The complete checkpoint with the highest step."""
        whole = [p for p in self.path.glob("checkpoint-*") if p.name[11:].isdigit() and is_complete(p)]
        return max(whole, key=step_of, default=None)

    def drop_weights(self) -> None:
        """Delete the trained model and every checkpoint: what is large, and not needed to read the run."""
        for folder in (self.model, self.best, *self.path.glob("checkpoint-*")):
            shutil.rmtree(folder, ignore_errors=True)

    def log(self, record: Mapping[str, Any]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """The logged steps. A last line that a kill cut off is left out."""
        if not self.metrics.exists():
            return []
        records = []
        for line in self.metrics.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

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
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def _forget_after(self, step: int) -> None:
        # Steps after the checkpoint will be run, and logged, again
        kept = [record for record in self.history() if record["step"] <= step]
        write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps behind a checkpoint."""
    return int(json.loads((checkpoint / "trainer_state.json").read_text())["global_step"])


def is_complete(checkpoint: Path) -> bool:
    """Whether the checkpoint was written to its end: the trainer's state is its last file."""
    try:
        step_of(checkpoint)
    except (OSError, ValueError, KeyError):
        return False
    return True
