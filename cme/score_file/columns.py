"""Scores -> the columns that are added to a row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from cme.errors import DatasetError
from cme.files.records import Example, Layout
from cme.score_file.options import Options
from cme.scores import SIGNALS, How, ResponseScore, combine

Kind = Literal["number", "count", "flag", "text", "tokens"]
Scores = Mapping[str, ResponseScore]
"""A response's score by verifier."""

_SIGNAL_KINDS: dict[str, Kind] = {
    **{name: "count" if name == "num_tokens" else "number" for name in SIGNALS},
    "unscorable": "text",
}


_JOINT: tuple[tuple[str, How], ...] = (
    ("mean_logprob", "mean"),
    ("mean_logprob", "min"),
    ("bits_per_byte", "mean"),
    ("bits_per_byte", "max"),
)
"""What is said about several verifiers together: signals, and how they are combined."""


@dataclass(frozen=True)
class Columns:
    """Which columns a run adds, and what is in them.

    Attributes:
        verifiers: their names.
        prefix: of every added column.
        finished, span, tokens: whether there are columns of these.
        many: a row has a list of responses, so its values are lists.
    """

    verifiers: tuple[str, ...]
    prefix: str
    finished: bool
    span: bool
    tokens: bool
    many: bool

    @staticmethod
    def of(options: Options, layout: Layout) -> Columns:
        return Columns(
            verifiers=tuple(verifier.name for verifier in options.verifiers),
            prefix=options.prefix,
            finished=layout.has_finished and layout.finished != options.prefix + "finished",
            span=options.columns.span_column is not None,
            tokens=options.tokens,
            many=layout.many,
        )

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """What each column holds of a response, by name, in order."""
        of_one: dict[str, Kind] = {**_SIGNAL_KINDS}
        if self.span:
            of_one |= {f"span_{name}": kind for name, kind in _SIGNAL_KINDS.items()}
        if self.tokens:
            of_one["tokens"] = "tokens"
        kinds: dict[str, Kind] = {"finished": "flag"} if self.finished else {}
        for verifier in self.verifiers:
            kinds |= {self._start(verifier) + name: kind for name, kind in of_one.items()}
        if len(self.verifiers) > 1:
            kinds |= {f"{signal}_{how}": "number" for signal, how in _JOINT}
        return {self.prefix + name: kind for name, kind in kinds.items()}

    def check(self, existing: Sequence[str], options: Options) -> None:
        """Raise DatasetError if a column would take the place of one that the input has."""
        both = [name for name in self.kinds if name in existing]
        if both:
            raise DatasetError(
                f"{options.input} already has the columns {', '.join(both)}: "
                "give the added ones other names with --prefix"
            )

    def of_row(self, examples: Sequence[Example], scores: Sequence[Scores]) -> dict[str, Any]:
        """The values of a row, from its responses and their scores."""
        each = [self._of_response(example, score) for example, score in zip(examples, scores, strict=True)]
        return {name: [values[name] for values in each] for name in self.kinds} if self.many else each[0]

    def _of_response(self, example: Example, scores: Scores) -> dict[str, Any]:
        values: dict[str, Any] = {"finished": example.finished} if self.finished else {}
        for verifier, score in scores.items():
            of_one = _signals(score)
            if self.span:
                of_one |= {f"span_{name}": value for name, value in _signals(_span_score(example, score)).items()}
            if self.tokens:
                of_one["tokens"] = _tokens(score)
            values |= {self._start(verifier) + name: value for name, value in of_one.items()}
        if len(self.verifiers) > 1:
            values |= _joint(scores)
        return {self.prefix + name: value for name, value in values.items()}

    def name(self, verifier: str, signal: str) -> str:
        """What the column of a verifier's signal is called."""
        return self.prefix + self._start(verifier) + signal

    def _start(self, verifier: str) -> str:
        return f"{verifier}/" if len(self.verifiers) > 1 else ""


def not_scored(problem: str) -> ResponseScore:
    """The score of a response that did not get as far as a verifier."""
    return ResponseScore(None, (), 0, problem)


def _signals(score: ResponseScore) -> dict[str, Any]:
    values = score.as_dict()
    return {name: _finite(values[name]) for name in _SIGNAL_KINDS}


def _finite(value: Any) -> Any:
    # JSON has no infinity; the perplexity of an absurd response may be one
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tokens(score: ResponseScore) -> list[dict[str, Any]] | None:
    if score.tokens is None or score.unaligned is not None:
        return None
    return [asdict(token) for token in score.per_token()]


def _span_score(example: Example, score: ResponseScore) -> ResponseScore:
    if score.tokens is None:
        return score
    if score.unaligned is not None:
        return not_scored(score.unaligned)
    return score.within(*example.span) if isinstance(example.span, tuple) else not_scored(str(example.span))


def _joint(scores: Scores) -> dict[str, float | None]:
    each = [[score] for score in scores.values()]
    return {f"{signal}_{how}": combine(each, how, signal)[0] for signal, how in _JOINT}
