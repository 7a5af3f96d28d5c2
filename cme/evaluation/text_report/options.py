"""What a run of `cme eval text` is to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cme.evaluation.options import Generation

GENERATION = Generation(max_new_tokens=256, temperature=1.0, batch_size=64)


@dataclass(frozen=True)
class Options:
    """Attributes:
    a, b: models (hub id, local folder, demo model) or files of responses.
    output: folder.
    prompts: a task, a file or a hub id; None if both sides are files.
    limit: at most so many prompts.
    generation: how models respond; the temperature is also that of entropy and divergence.
    device, trust_remote_code: for `cme.models.load_model`.
    overwrite: generate again what the folder has.
    """

    a: str
    b: str
    output: Path
    prompts: str | None = None
    limit: int | None = None
    generation: Generation = GENERATION
    device: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False
    progress: bool = True
