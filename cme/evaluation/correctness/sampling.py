"""A generator's responses to questions, judged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cme.evaluation.correctness.data import Response, answered
from cme.evaluation.correctness.models import Models
from cme.evaluation.correctness.options import Options
from cme.evaluation.generate import sample
from cme.tasks.matchers import Matcher
from cme.tasks.questions import Question


def sample_responses(
    questions: Sequence[Question], matcher: Matcher, models: Models, options: Options, path: Path
) -> list[Response]:
    """The generator's responses to each question, the questions in order.

    They are kept in `path`. Raises CMEError if it holds responses that were sampled otherwise.
    """
    assert options.generator is not None
    responses = sample(
        options.generator,
        [question.prompt for question in questions],
        options.generation,
        options.models,
        path,
        load=models.generator,
        ids=[question.id for question in questions],
        title="sampling",
        progress=options.progress,
    )
    drafts = [question for question in questions for _ in range(options.generation.samples)]
    return [answered(q, r.text, r.finished, matcher) for q, r in zip(drafts, responses, strict=True)]
