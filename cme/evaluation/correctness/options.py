"""What a run of `cme eval correctness` is to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cme.evaluation.options import Generation
from cme.options import ModelOptions
from cme.tasks.questions import Split


@dataclass(frozen=True)
class Samples(Generation):
    """Of a generator, in its own template. The seed is also that of random weights and of folds."""

    template: str = "auto"


GENERATION = Samples(samples=4, max_new_tokens=64, temperature=1.0, batch_size=64)


@dataclass(frozen=True)
class Options:
    """Attributes:
    data: a file, or the name of a task.
    output: folder.
    verifier: hub id, local folder or demo model.
    generator: of the responses, where there are none yet; and a control. None for neither.
    candidates: take a task's options as the responses, also if there is a generator.
    generation: how the generator responds.
    matcher: of a file with gold answers, or None; a task has its own.
    split, limit: of a task: which questions, and how many of them at most.
    prompt_column … id_column: of a file; None finds the usual names.
    template, verifier_chat_template_kwargs: of the verifier.
    models, max_batch_tokens: of all models.
    random_verifiers: how many verifiers with random weights are controls.
    resamples: of the bootstrap.
    overwrite: forget an earlier run in `output`.
    """

    data: str
    output: Path
    verifier: str
    generator: str | None = None
    candidates: bool = False
    generation: Generation = GENERATION
    matcher: str | None = None
    split: Split | Literal["all"] = "held_out"
    limit: int | None = None
    prompt_column: str | None = None
    response_column: str | None = None
    correct_column: str | None = None
    answer_column: str | None = None
    choices_column: str | None = None
    span_column: str | None = None
    id_column: str | None = None
    template: str = "auto"
    verifier_chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    models: ModelOptions = field(default_factory=ModelOptions)
    max_batch_tokens: int = 8192
    random_verifiers: int = 1
    resamples: int = 10_000
    overwrite: bool = False
    progress: bool = True
