"""What a run is about: questions to be answered, or responses that are right or wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cme.files.tables import Malformed
from cme.tasks.matchers import Matcher
from cme.tasks.questions import Question
from cme.text.rendering import Messages


@dataclass(frozen=True)
class Response:
    """Attributes:
    question: id of its question.
    prompt: what the verifier sees before the response.
    asked: what the generator was asked.
    correct: whether it is right.
    span: the answer in `text`, in characters; None if none was found.
    answer: what its answer says, for the majority vote; equal texts say the same.
    finished: ended by itself; None if nobody knows.
    problem: why it can't be scored, whatever the model.
    """

    question: str
    prompt: str | Messages
    asked: str | Messages
    text: str
    correct: bool
    span: tuple[int, int] | None
    answer: str
    finished: bool | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Data:
    """Either `questions`, which a generator is to answer, or `responses`.

    Attributes:
        matcher: tells which generated response is right.
        sampled: responses to one question are comparable samples, so that a majority of them means something.
        malformed: lines of a file that hold no row.
        about: for the record.
        package: where a task's questions come from.
    """

    about: str
    questions: Sequence[Question] = ()
    responses: Sequence[Response] = ()
    matcher: Matcher | None = None
    sampled: bool = True
    malformed: Sequence[Malformed] = ()
    package: str | None = None


def answered(question: Question, text: str, finished: bool | None, matcher: Matcher) -> Response:
    """A response to a question, judged."""
    found = matcher.find(text, question)
    return Response(
        question=question.id,
        prompt=question.full_text,
        asked=question.prompt,
        text=text,
        correct=matcher.accepts(text, found, question),
        span=None if found is None else (found.start, found.end),
        answer=text.strip() if found is None else found.key,
        finished=finished,
    )


def identity_of(responses: Sequence[Response]) -> list[Mapping[str, Any]]:
    """What of the responses their scores depend on, for JSON."""
    return [{"prompt": r.prompt, "asked": r.asked, "text": r.text, "span": r.span} for r in responses]
