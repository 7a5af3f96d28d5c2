"""Scores -> the columns that are added to a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cme.errors import DatasetError
from cme.score_file.options import Options
from cme.score_file.rows import Example, Layout
from cme.scoring import SIGNALS, ResponseScore

Kind = Literal["number", "count", "flag", "text", "tokens"]
Scores = Mapping[str, ResponseScore]
"""A response's score by verifier."""


@dataclass(frozen=True)
class Column:
    """An added column: its type, and its value for one response."""

    kind: Kind
    value: Callable[[Example, Scores], Any]


def added_columns(options: Options, layout: Layout) -> dict[str, Column]:
    """The added columns by name, in order."""
    names = [verifier.name for verifier in options.verifiers]
    columns: dict[str, Column] = {}
    if layout.has_finished and layout.finished != options.prefix + "finished":
        columns["finished"] = Column("flag", lambda example, scores: example.finished)
    for name in names:
        start = f"{name}/" if len(names) > 1 else ""
        columns |= {start + k: c for k, c in _of_verifier(name, options).items()}
    if len(names) > 1:
        for signal, worst in (("mean_logprob", min), ("bits_per_byte", max)):
            columns[f"{signal}_mean"] = Column("number", _joint(signal, lambda values: sum(values) / len(values)))
            columns[f"{signal}_{worst.__name__}"] = Column("number", _joint(signal, worst))
    return {options.prefix + name: column for name, column in columns.items()}


def check_names(added: Mapping[str, Column], existing: Sequence[str], options: Options) -> None:
    """Raise DatasetError if a column would take the place of one that the input has."""
    both = [name for name in added if name in existing]
    if both:
        raise DatasetError(
            f"{options.input} already has the columns {', '.join(both)}: "
            "give the added ones other names with --prefix"
        )


def values_of(
    examples: Sequence[Example], scores: Sequence[Scores], columns: Mapping[str, Column], many: bool
) -> dict[str, Any]:
    """The added values of one row: lists if it has many responses."""
    values = {
        name: [column.value(example, score) for example, score in zip(examples, scores, strict=True)]
        for name, column in columns.items()
    }
    return values if many else {name: value[0] for name, value in values.items()}


def _of_verifier(name: str, options: Options) -> dict[str, Column]:
    columns = _signals(lambda example, scores: scores[name])
    if options.span_column is not None:
        columns |= {f"span_{k}": c for k, c in _signals(lambda e, scores: _span_score(e, scores[name])).items()}
    if options.tokens:
        columns["tokens"] = Column("tokens", lambda example, scores: _tokens(scores[name]))
    return columns


def _signals(score_of: Callable[[Example, Scores], ResponseScore]) -> dict[str, Column]:
    def signal(name: str) -> Callable[[Example, Scores], Any]:
        return lambda example, scores: _finite(score_of(example, scores).as_dict()[name])

    kinds: dict[str, Kind] = {name: "count" if name == "num_tokens" else "number" for name in SIGNALS}
    return {name: Column(kind, signal(name)) for name, kind in {**kinds, "unscorable": "text"}.items()}


def _span_score(example: Example, score: ResponseScore) -> ResponseScore:
    if score.tokens is None:
        return score
    if isinstance(example.span, tuple):
        return score.within(*example.span)
    return ResponseScore(None, (), 0, str(example.span), score.finished)


def _joint(signal: str, join: Callable[[list[float]], float]) -> Callable[[Example, Scores], float | None]:
    def value(example: Example, scores: Scores) -> float | None:
        values = [getattr(score, signal) for score in scores.values()]
        # Over the verifiers that could score it would be a number about other models than in the next row
        return None if None in values else join(values)

    return value


def _tokens(score: ResponseScore) -> list[dict[str, Any]] | None:
    return None if score.tokens is None else [asdict(token) for token in score.per_token()]


def _finite(value: Any) -> Any:
    # JSON has no infinity; the perplexity of an absurd response may be one
    return None if isinstance(value, float) and not math.isfinite(value) else value


def problem_score(problem: str) -> ResponseScore:
    """The score of a response that did not get as far as a verifier."""
    return ResponseScore(None, (), 0, problem)
