"""Scores -> the columns that are added to a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from cme.files.records import Example
from cme.files.strict_json import finite
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
"""Signals of several verifiers together, and how they are combined."""


@dataclass(frozen=True)
class AddedColumns:
    """The columns that a run adds, and their values.

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

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """The kind of value per response in each column, by the column's name, in order."""
        of_one: dict[str, Kind] = {**_SIGNAL_KINDS}
        if self.span:
            of_one |= {f"span_{name}": kind for name, kind in _SIGNAL_KINDS.items()}
        if self.tokens:
            of_one["tokens"] = "tokens"
        kinds: dict[str, Kind] = {self.prefix + "finished": "flag"} if self.finished else {}
        for verifier in self.verifiers:
            kinds |= {self.name(verifier, signal): kind for signal, kind in of_one.items()}
        if len(self.verifiers) > 1:
            kinds |= {f"{self.prefix}{signal}_{how}": "number" for signal, how in _JOINT}
        return kinds

    def name(self, verifier: str, signal: str) -> str:
        """The name of the column of a verifier's signal."""
        return self.prefix + (f"{verifier}/" if len(self.verifiers) > 1 else "") + signal

    def of_row(self, examples: Sequence[Example], scores: Sequence[Scores]) -> dict[str, Any]:
        """The values of a row, from its responses and their scores."""
        each = [self._of_response(example, score) for example, score in zip(examples, scores, strict=True)]
        return {name: [values[name] for values in each] for name in self.kinds} if self.many else each[0]

    def _of_response(self, example: Example, scores: Scores) -> dict[str, Any]:
        values: dict[str, Any] = {self.prefix + "finished": example.finished} if self.finished else {}
        for verifier, score in scores.items():
            of_one = _signals(score)
            if self.span:
                of_one |= {f"span_{name}": value for name, value in _signals(_span_score(example, score)).items()}
            if self.tokens:
                of_one["tokens"] = _tokens(score)
            values |= {self.name(verifier, signal): value for signal, value in of_one.items()}
        if len(self.verifiers) > 1:
            each = [[score] for score in scores.values()]
            joint = {f"{signal}_{how}": combine(each, how, signal)[0] for signal, how in _JOINT}
            values |= {self.prefix + name: value for name, value in joint.items()}
        return values


def not_scored(problem: str) -> ResponseScore:
    """The score of a response that did not get as far as a verifier."""
    return ResponseScore(None, (), 0, problem)


def _signals(score: ResponseScore) -> dict[str, Any]:
    values = score.as_dict()
    return {name: finite(values[name]) for name in _SIGNAL_KINDS}  # an absurd response's perplexity may not be


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
