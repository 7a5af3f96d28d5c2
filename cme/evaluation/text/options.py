"""The options of `cme eval text`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cme.evaluation.options import Generation
from cme.options import ModelOptions, option, positive

GENERATION = Generation(max_new_tokens=256, temperature=1.0, batch_size=64)


@dataclass(frozen=True)
class Options:
    """A run of `cme eval text`. The temperature of `generation` is also that of entropy and divergence."""

    a: str = option(
        help="a model (hub id, local folder, demo model) or a file of responses", positional=True, metavar="A"
    )
    b: str = option(help="the same, to compare with A", positional=True, metavar="B")
    prompts: str | None = option(
        None, "for models: a task, whose held-out questions are asked, or a file", metavar="FILE_OR_TASK"
    )
    limit: int | None = option(None, "the first N prompts only", type=positive, metavar="N")
    output: Path = option(Path("runs/text"), "folder", short="-o", metavar="DIR")
    overwrite: bool = option(False, "generate again the responses that the folder has")
    progress: bool = option(True, "show no bar")
    generation: Generation = GENERATION
    models: ModelOptions = field(default_factory=ModelOptions)
