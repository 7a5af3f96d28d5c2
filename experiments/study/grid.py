"""A study's configuration -> its cells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cme.errors import CMEError

_KEYS = {"common", "tasks", "rewards", "grid"}


@dataclass(frozen=True)
class Cell:
    """A task, a reward and a seed.

    Attributes:
        settings: of `cme.train`.
    """

    task: str
    reward: str
    seed: int
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.task}-{self.reward}-{self.seed}"


def load(path: Path) -> list[Cell]:
    """Cells in the order of the grid, each once. Raises CMEError for what the file lacks or misnames."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise CMEError(f"could not read {path}: {error}") from error
    if not isinstance(config, dict) or config.keys() != _KEYS:
        raise CMEError(f"{path} must have the keys {', '.join(sorted(_KEYS))}, and no other")
    cells: dict[str, Cell] = {}
    for block in config["grid"]:
        for seed in block["seeds"]:
            for task in block["tasks"]:
                for reward in block["rewards"]:
                    cell = Cell(task, reward, seed, _settings(config, path, task, reward, seed))
                    cells.setdefault(cell.name, cell)
    return list(cells.values())


def _settings(config: dict[str, Any], path: Path, task: str, reward: str, seed: int) -> dict[str, Any]:
    for kind, name in (("tasks", task), ("rewards", reward)):
        if name not in config[kind]:
            raise CMEError(
                f"the grid of {path} names {name!r}, which is not in its {kind}: {', '.join(config[kind])}"
            )
    return {**config["common"], **config["tasks"][task], **config["rewards"][reward], "seed": seed}
