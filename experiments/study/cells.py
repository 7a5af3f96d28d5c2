"""One cell of the study: a training run in a process of its own, and what is kept of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from cme.errors import CMEError
from cme.files import atomic
from cme.train.folder import RunFolder
from experiments.study.grid import Cell

SETTINGS, LOG = "settings.yaml", "train.log"
_ANSWER = ("question", "greedy", "correct", "reward", "length", "finished", "prompt_copy_rate", "echo_rate")


def run(cell: Cell, folder: Path) -> dict[str, Any]:
    """Train, or resume what an interruption left in `folder`; returns what is kept of the run.

    Raises CMEError if training failed, with the end of its log, or if `folder` is of a run with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder.with_name(folder.name + "." + SETTINGS)
    if (folder / "run.json").exists() and settings.exists():
        check_settings(cell, yaml.safe_load(settings.read_text(encoding="utf-8")), folder)
    atomic.write_text(settings, yaml.safe_dump(cell.settings, sort_keys=False))
    if not (folder / "summary.json").exists():
        _train(settings, folder)
    return kept(cell, folder)


def check_settings(cell: Cell, found: dict[str, Any], where: object) -> None:
    """Raise CMEError if the settings of the run that `where` holds are not those of the cell."""
    names = [name for name in {**cell.settings, **found} if cell.settings.get(name) != found.get(name)]
    if names:
        differ = ", ".join(f"{name} = {found.get(name)!r}, not {cell.settings.get(name)!r}" for name in names)
        raise CMEError(
            f"{where} is of a run with {differ}: delete it to run the cell again, restore the grid's settings, or "
            "give other folders with --runs and --results"
        )


def _train(settings: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "cme.train", "--config", str(settings), "--output-dir", str(folder)]
    if (folder / "run.json").exists():
        command += ["--resume-from-checkpoint", "latest"]
    log = folder.with_name(folder.name + "." + LOG)
    with log.open("a", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if code != 0:
        end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise CMEError(f"training {folder.name} failed with exit code {code}; the end of {log}:\n{end}")


def kept(cell: Cell, folder: Path) -> dict[str, Any]:
    """Settings, the logged numbers of every step, and each held-out answer without its text."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    run_folder = RunFolder(folder)
    answers = {
        when: [
            {name: _short(getattr(answer, name)) for name in _ANSWER}
            for answer in run_folder.read_answers(when) or []
        ]
        for when in ("before", "after")
    }
    return {
        "task": cell.task,
        "reward": cell.reward,
        "seed": cell.seed,
        "settings": cell.settings,
        "environment": summary["environment"],
        "seconds": summary["seconds"],
        "alarms": summary.get("alarms"),
        "steps": [{name: _short(value) for name, value in step.items()} for step in run_folder.history()],
        **answers,
    }


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
