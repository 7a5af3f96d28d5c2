"""Judges, of which one is a model that is loaded here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

from cme.evaluation.winrate.verdict import Verdict, parse
from cme.options import ModelOptions, model_name
from cme.text.messages import Messages

Failure = Literal["unreachable", "refused", "unparsable"]
"""No answer came; the judge declined this one request; there is no verdict in its answer."""

CUT_OFF_ERROR = "the answer was cut off at its greatest length: allow more, --judge-option max_tokens=N"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The return of one call of a judge.

    Attributes:
        answer: as it came; None if there is none.
        failure: None if there is an answer with a verdict in it; `error` is the failure in words.
        cut_off: the answer ended because it had reached its greatest length.
        probabilities: of the labels, from a local judge, relative to all text that could stand there.
        prompt_tokens, completion_tokens: as the judge reports them.
        seconds: with retries.
        verdict: of the answer, once it is `judged`.
    """

    answer: str | None = None
    failure: Failure | None = None
    error: str | None = None
    cut_off: bool = False
    probabilities: dict[str, float] | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    seconds: float = 0.0
    attempts: int = 1
    verdict: Verdict | None = None

    def judged(self, asked: str) -> Reply:
        """With the verdict that the answer gives to the question `asked`, or the failure to give one."""
        if self.answer is None:
            return self
        verdict = parse(self.answer, self.cut_off, asked)
        if verdict is not None:
            return replace(self, verdict=verdict, failure=None, error=None)
        error = CUT_OFF_ERROR if self.cut_off else "the answer holds no verdict, or several that differ"
        return replace(self, verdict=None, failure="unparsable", error=error)


def token_count(value: Any) -> int | None:
    """A number of tokens that a judge reports; None if it is none."""
    return value if type(value) is int and 0 <= value < 2**53 else None


class Judge(Protocol):
    """`identity` is all that a verdict depends on, besides the text that is asked; it holds no secrets."""

    name: str

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def ask(self, texts: Sequence[str], record: Callable[[int, Reply], None]) -> None:
        """Call `record` with the number of a text and the reply to it, as replies come.

        An error in `record` ends the asking, and is raised. Raises CMEError if no answer is to be hoped for.
        """


LABELS = ("1", "2", "tie")
_LEAD = "Verdict:"
_CHUNK = 16  # calls whose verdicts are lost when the process is killed


class LocalJudge:
    """The judge's turn begins with "Verdict:", and the verdict is the label that is most likely to follow: one
    forward pass, no sampling, and always in the form that was asked for. It can't reason before it judges."""

    def __init__(self, model: str, options: ModelOptions) -> None:
        """`model` is a hub id, a folder, or a model of the demo."""
        self.model, self.options = model, options
        self.name = model_name(model)

    @cached_property
    def identity(self) -> dict[str, Any]:
        from cme.models import model_files  # brings torch

        weights = {"model": self.model, "weights": model_files(self.model), "dtype": self.options.dtype}
        return {"kind": "local", **weights, "labels": LABELS, "lead": _LEAD}

    def ask(self, texts: Sequence[str], record: Callable[[int, Reply], None]) -> None:
        """In chunks, so that most verdicts are kept if the process is killed."""
        for start in range(0, len(texts), _CHUNK):
            for i, reply in enumerate(self._ask(texts[start : start + _CHUNK]), start):
                record(i, reply)

    @cached_property
    def _verifier(self) -> Any:
        from transformers.utils import logging

        from cme.models import load_model
        from cme.verifier import Verifier

        logging.disable_progress_bar()
        model, tokenizer = load_model(self.model, "judge", **self.options.kwargs())
        template = "chat" if tokenizer.chat_template else "{prompt} {response}"
        return Verifier.of(model, tokenizer, template=template)

    def _ask(self, texts: Sequence[str]) -> list[Reply]:
        start = time.monotonic()
        questions = [self._question(text) for text in texts for _ in LABELS]
        scores = self._verifier.score(questions, [f" {label}" for label in LABELS] * len(texts))
        seconds = round((time.monotonic() - start) / len(texts), 3)
        return [
            self._reply(questions[i], scores[i : i + len(LABELS)], seconds)
            for i in range(0, len(scores), len(LABELS))
        ]

    def _question(self, text: str) -> str | Messages:
        if self._verifier.renderer.template is not None:
            return f"{text}\n{_LEAD}"
        return [{"role": "user", "content": text}, {"role": "assistant", "content": _LEAD}]

    def _reply(self, question: str | Messages, scores: Sequence[Any], seconds: float) -> Reply:
        problem = next((score.unscorable for score in scores if score.unscorable), None)
        if problem is not None:
            return Reply(failure="refused", error=f"{self.model}: {problem}", seconds=seconds)
        probabilities = {label: math.exp(score.sum_logprob) for label, score in zip(LABELS, scores, strict=True)}
        return Reply(
            answer=f"{_LEAD} {max(probabilities, key=probabilities.__getitem__)}",
            probabilities=probabilities,
            prompt_tokens=len(self._verifier.renderer.prompt_ids(question)),
            completion_tokens=0,
            seconds=seconds,
        )
