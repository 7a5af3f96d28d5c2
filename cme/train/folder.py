"""A run's folder: what is in it, how it survives a kill, where to continue.

run.json            the settings that the run was started with
metrics.jsonl       one line per logged step
completions/        a Parquet file per logged step: prompts, completions, rewards, diagnostics
evaluation/         before.json, after.json: held-out answers with their scores
checkpoint-N/       to resume from, once it is sealed
alarms.jsonl        which alarm fired when; best/ is what a rollback takes
model/              the trained model
training.png
summary.json        written last: a run with one is finished
.cme-lock           held while a process is in the folder

A folder of weights is sealed by a manifest, written last, with the size and hash of each of its files. One that is
not as it was sealed is never used.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cme.errors import CMEError
from cme.evaluation.held_out import Answer, to_dicts
from cme.evaluation.report import versions
from cme.files.atomic import LOCK, locked_folder, sha256, write_text
from cme.files.journal import Journal
from cme.train.config import CMEConfig, generator_kwargs

if TYPE_CHECKING:
    from trl import GRPOConfig, ModelConfig

_MANIFEST = "cme-manifest.json"
_TRAINING_STATE = ("optimizer", "scheduler", "rng_state", "scaler", "trainer_state")

_OURS = ("verifier", "verifier_template", "score_end_of_turn", "score_thoughts", "canary", "stop_when", "on_alarm")
_TRLS = (
    *("seed", "max_steps", "num_train_epochs", "num_generations", "max_completion_length", "beta", "loss_type"),
    *("reward_weights", "multi_objective_aggregation"),
    "learning_rate",  # a schedule continues with the rate that is in the checkpoint, whatever is asked for
)
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs")

_END = ("max_steps", "num_train_epochs", "stop_when", "on_alarm")
"""Settings by which a run ends. A continuation may have others, and must have all else as it was."""


def settings_of(cme: CMEConfig, model: ModelConfig, grpo: GRPOConfig) -> dict[str, Any]:
    """The options that make a run what it is, for run.json."""
    data = Path(str(cme.dataset_name))
    return {
        "generator": model.model_name_or_path,
        "lora": model.use_peft and {name: v for name, v in vars(model).items() if name.startswith("lora_")},
        "chat_template_kwargs": generator_kwargs(grpo),
        "verifier_chat_template_kwargs": cme.chat_template_kwargs(),
        "reward": " ".join(cme.reward),
        "dataset": cme.dataset_name,
        "dataset_sha256": sha256(data) if data.is_file() else None,
        "completions_per_step": grpo.per_device_train_batch_size
        * grpo.gradient_accumulation_steps
        * grpo.world_size,
        "sampling": {name: getattr(grpo, name) for name in _SAMPLING},
        "lr_scheduler_type": str(getattr(grpo.lr_scheduler_type, "value", grpo.lr_scheduler_type)),
        **{name: getattr(cme, name) for name in _OURS},
        **{name: getattr(grpo, name) for name in _TRLS},
    }


def environment() -> dict[str, Any]:
    """Hardware, and the versions of what a run's numbers depend on."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else str(accelerator or "cpu"),
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        **versions("trl"),
    }


class RunFolder:
    """Files are replaced whole or not at all; journals grow by lines."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics = Journal(self.path / "metrics.jsonl")
        self.alarms = Journal(self.path / "alarms.jsonl")
        self.summary = self.path / "summary.json"
        self.picture = self.path / "training.png"
        self.model = self.path / "model"
        self.best = self.path / "best"

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes out of the folder. Raises CMEError if one is in it, or it can't be written to."""
        return locked_folder(self.path)

    def open(
        self, settings: Mapping[str, Any], resume: str, overwrite: bool
    ) -> tuple[Path | None, dict[str, Any] | None]:
        """The checkpoint to continue from, and what summary.json holds of a run that has nothing left to do.

        Both are None for a new run. `resume` is "", "latest" or a checkpoint's folder.
        """
        if not resume:
            self.start(settings, overwrite)
            return None, None
        self.check(settings)
        finished = self.finished(settings) if is_latest(resume) else None
        return (None, finished) if finished is not None else (self.resume(settings, resume), None)

    def start(self, settings: Mapping[str, Any], overwrite: bool) -> None:
        """Ready the folder for a new run. Raises CMEError if it holds a run that has come as far as to write
        something, unless `overwrite` deletes that."""
        if (self.path / "run.json").exists():
            if not overwrite and {path.name for path in self.path.iterdir()} - {"run.json", LOCK}:
                state = "a finished run" if self.summary.exists() else "a run that was interrupted"
                raise CMEError(
                    f"{self.path} holds {state}. Continue it with --resume-from-checkpoint latest, "
                    "write elsewhere with --output-dir, or delete it with --overwrite."
                )
            self._clear()
        self.write_json("run.json", settings)

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise CMEError if the run in the folder was started with settings that a continuation can't change."""
        started = self._read_json("run.json") or {}
        for name in started:
            if name in settings and name not in _END and started[name] != settings[name]:
                raise CMEError(
                    f"{self.path} was started with {name} = {started[name]!r}, not {settings[name]!r}: "
                    "continue with the same, or start a new run in another --output-dir"
                )

    def finished(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The contents of summary.json, if the run has come to the end that `settings` ask for."""
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

    def history(self) -> list[dict[str, Any]]:
        """The logged steps."""
        return list(self.metrics)

    def seconds(self) -> float:
        """Duration of the sessions before this one, up to the last logged step that is kept."""
        return max((float(record.get("seconds", 0)) for record in self.metrics), default=0.0)

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
                "--model-name-or-path in another --output-dir, or anew with --overwrite"
            )
        return None

    def _given(self, checkpoint: Path) -> Path:
        if (reason := _why_not(checkpoint)) is not None:
            raise CMEError(
                f"{checkpoint} is not a complete checkpoint: {reason}. "
                "Use --resume-from-checkpoint latest to take the newest complete one."
            )
        step = sealed_step(checkpoint) or 0
        if later := [str(path) for path in self._checkpoints() if (sealed_step(path) or 0) > step]:
            raise CMEError(
                f"{', '.join(later)} would be mixed with the steps after {checkpoint}: continue with "
                "--resume-from-checkpoint latest, delete the later checkpoints, or give another --output-dir"
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
    """--resume-from-checkpoint asks for the run's newest checkpoint, and names no folder."""
    return checkpoint.lower() in ("latest", "true")


def seal(folder: Path, step: int) -> None:
    """Declare the weights of a step complete: the files of their folder have to stay as they are."""
    paths = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    _write_manifest(folder, step, {name: _fingerprint(folder / name) for name in paths if name != _MANIFEST})


def sealed_step(folder: Path) -> int | None:
    """The optimizer steps behind a sealed folder, its files not looked at; None for one that is not sealed."""
    manifest = _read_manifest(folder)
    return None if manifest is None else int(manifest["step"])


def damage(folder: Path) -> str | None:
    """Why a folder is not complete; None if it is as it was sealed."""
    manifest = _read_manifest(folder)
    if manifest is None:
        return f"it has no {_MANIFEST}, which is written last"
    for name, written in manifest["files"].items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _fingerprint(folder / name) != written:
            return f"{name} is not as it was written"
    return None


def link_weights(checkpoint: Path, target: Path) -> None:
    """Put the weights of a sealed checkpoint into `target`: as links, which outlive it and take no space."""
    manifest = _read_manifest(checkpoint)
    assert manifest is not None
    files = {name: kept for name, kept in manifest["files"].items() if not name.startswith(_TRAINING_STATE)}
    new = target.with_name(target.name + ".tmp")
    shutil.rmtree(new, ignore_errors=True)
    for name in files:
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(checkpoint / name, new / name)
        except OSError:  # a file system without links
            shutil.copy2(checkpoint / name, new / name)
    _write_manifest(new, manifest["step"], files)
    shutil.rmtree(target, ignore_errors=True)
    new.rename(target)


def _why_not(checkpoint: Path) -> str | None:
    """Why a checkpoint can't be resumed from."""
    reason = damage(checkpoint)
    files = (_read_manifest(checkpoint) or {"files": ()})["files"]
    if reason is None and not any("optim" in name for name in files):  # DeepSpeed's are called ..._optim_states.pt
        reason = "it has no state of the optimizer (--save-only-model)"
    return reason


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _write_manifest(folder: Path, step: int, files: dict[str, Any]) -> None:
    write_text(folder / _MANIFEST, json.dumps({"step": step, "files": files}, indent=1))


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and {"step", "files"} <= manifest.keys() else None
