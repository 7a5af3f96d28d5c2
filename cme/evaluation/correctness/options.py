"""What a run of `cme eval correctness` is to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cme.tasks.questions import Split


@dataclass(frozen=True)
class Options:
    """Attributes:
    data: a file, or the name of a task.
    output: folder.
    verifier: hub id, local folder or demo model.
    generator: of the responses, where there are none yet; and a control. None for neither.
    candidates: take a task's options as the responses, also if there is a generator.
    samples, temperature, top_p, max_new_tokens: of the generator's responses to a question.
    matcher: of a file with gold answers, or None; a task has its own.
    split, num_questions: of a task: which questions, and how many of them at most.
    prompt_column … id_column: of a file; None finds the usual names.
    template, dtype, device, max_batch_tokens, trust_remote_code: of the models.
    random_verifiers: how many verifiers with random weights are controls.
    resamples: of the bootstrap.
    seed: of the samples, of the random weights and of the folds.
    overwrite: forget an earlier run in `output`.
    """

    data: str
    output: Path
    verifier: str
    generator: str | None = None
    candidates: bool = False
    samples: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 64
    matcher: str | None = None
    split: Split | Literal["all"] = "held_out"
    num_questions: int | None = None
    prompt_column: str | None = None
    response_column: str | None = None
    correct_column: str | None = None
    answer_column: str | None = None
    choices_column: str | None = None
    span_column: str | None = None
    id_column: str | None = None
    template: str = "auto"
    dtype: str | None = None
    device: str | None = None
    max_batch_tokens: int = 8192
    trust_remote_code: bool = False
    random_verifiers: int = 1
    resamples: int = 10_000
    seed: int = 0
    overwrite: bool = False
    progress: bool = True
