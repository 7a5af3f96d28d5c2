"""Metrics of two sides' responses to the same prompts, and their differences with intervals over prompts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cme.diagnostics import byte_counts, diagnose, distinct_rate, jensen_shannon, words
from cme.errors import CMEError
from cme.evaluation.statistics import Interval, bootstrap, mean, mean_interval
from cme.files.strict_json import finite

_RESAMPLES_OF_DRIFT = 2000


@dataclass(frozen=True)
class Response:
    """A response to a prompt.

    Attributes:
        prompt: its text.
        tokens: of the model, the end of the turn included; None for a response from a file.
        finished: ended by itself; None if nobody knows.
    """

    prompt: str
    text: str
    tokens: int | None = None
    finished: bool | None = None


Side = dict[str, list[Response]]
"""Responses by prompt."""

Means = dict[str, dict[str, float]]
"""metric -> prompt -> mean over the prompt's responses."""


@dataclass(frozen=True)
class Change:
    """A metric's means over the prompts that have it on both sides (else, over those of the side that has it), and
    of B - A with its 95 % interval, paired by prompt. None is what is not known, or not finite."""

    metric: str
    a: float | None
    b: float | None
    difference: float | None
    interval_95: Interval | None


def by_prompt(responses: Iterable[Response]) -> Side:
    side: Side = defaultdict(list)
    for response in responses:
        side[response.prompt].append(response)
    return dict(side)


def check_prompts(a: Side, b: Side) -> None:
    """Raise CMEError unless both sides answer the same prompts."""
    for name, missing in (("B", a.keys() - b.keys()), ("A", b.keys() - a.keys())):
        if missing:
            raise CMEError(
                f"{len(missing)} prompts have no response of {name}, such as {min(missing)[:80]!r}: "
                "give both sides the same prompts"
            )
    if not a:
        raise CMEError("there are no responses to compare")


def text_metrics(side: Side, other: Side) -> Means:
    """The metrics of text alone. `distinct_n`, which falls with the number of responses, is over as many responses
    per prompt, taken together, as both sides have."""
    means: Means = defaultdict(dict)
    for prompt, responses in side.items():
        rows = [_of_response(response) for response in responses]
        values = {name: [row[name] for row in rows] for name in rows[0]}
        shared = [response.text for response in responses[: len(other[prompt])]]
        values |= {f"distinct_{n}": [distinct_rate(shared, n)] for n in (1, 2)}
        for name, some in values.items():
            known = [value for value in some if value is not None]
            if known:
                means[name][prompt] = sum(known) / len(known)
    return dict(means)


def _of_response(response: Response) -> dict[str, float | None]:
    finished = response.finished
    return {
        "tokens": response.tokens,
        "words": len(words(response.text)),
        "bytes": len(response.text.encode(errors="surrogatepass")),
        "finished_rate": None if finished is None else float(finished),
        "truncated_rate": None if finished is None else float(not finished),
        "empty_rate": float(not response.text.strip()),
        **diagnose(response.prompt, response.text),
    }


def compare(a: Means, b: Means) -> list[Change]:
    """The change of each metric that a side has, in their order."""
    return [_change(name, a.get(name, {}), b.get(name, {})) for name in dict.fromkeys([*a, *b])]


def _change(name: str, a: Mapping[str, float], b: Mapping[str, float]) -> Change:
    common = [prompt for prompt in a if prompt in b]
    if common:
        a, b = ({prompt: side[prompt] for prompt in common} for side in (a, b))
    changes = [b[prompt] - a[prompt] for prompt in common]
    interval = mean_interval(changes) if all(map(math.isfinite, changes)) else None
    return Change(name, finite(mean([*a.values()])), finite(mean([*b.values()])), finite(mean(changes)), interval)


def byte_drift(a: Side, b: Side) -> dict[str, Any]:
    """Jensen-Shannon divergence of the sides' byte histograms, in bits, with its interval over prompts; and that
    of two halves of A's prompts, a value that no change at all may give."""
    counts_a, counts_b = (np.stack([byte_counts([r.text for r in s[p]]) for p in a]) for s in (a, b))  # [P, 256]

    def drift(rows: Any) -> float:
        return jensen_shannon(counts_a[rows].sum(0), counts_b[rows].sum(0))

    value, halves = drift(slice(None)), jensen_shannon(counts_a[::2].sum(0), counts_a[1::2].sum(0))
    interval = bootstrap(drift, len(a), resamples=_RESAMPLES_OF_DRIFT)
    return {"value": finite(value), "interval_95": interval, "halves_of_a": finite(halves)}
