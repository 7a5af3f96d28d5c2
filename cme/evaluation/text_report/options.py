"""What a run of `cme eval text` is to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cme.evaluation.options import Generation
from cme.options import ModelOptions

GENERATION = Generation(max_new_tokens=256, temperature=1.0, batch_size=64)


@dataclass(frozen=True)
class Options:
    """Attributes:
    a, b: models (hub id, local folder, demo model) or files of responses.
    output: folder.
    prompts: a task, a file or a hub id; None if both sides are files.
    limit: at most so many prompts.
    generation: how models respond; the temperature is also that of entropy and divergence.
    models: how they are loaded.
    overwrite: generate again what the folder has.
    """

    a: str
    b: str
    output: Path
    prompts: str | None = None
    limit: int | None = None
    generation: Generation = GENERATION
    models: ModelOptions = field(default_factory=ModelOptions)
    overwrite: bool = False
    progress: bool = True
