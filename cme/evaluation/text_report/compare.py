"""Two sides' responses to the same prompts -> their metrics, and differences with intervals over prompts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cme.diagnostics import byte_counts, diagnose, distinct_rate, jensen_shannon, words
from cme.errors import CMEError
from cme.evaluation.statistics import Interval, bootstrap, mean_interval
from cme.evaluation.text_report.responses import Response

_RESAMPLES_OF_DRIFT = 2000


@dataclass(frozen=True)
class Row:
    """A metric: the means of both sides over the prompts that have it on both (else, on the one that has it), and
    of B - A with its 95 % interval, paired by prompt."""

    metric: str
    a: float | None
    b: float | None
    difference: float | None
    interval_95: Interval | None


Means = dict[str, dict[str, float]]
"""metric -> prompt -> mean over the prompt's responses."""


def by_prompt(responses: Sequence[Response]) -> dict[str, list[Response]]:
    groups: dict[str, list[Response]] = defaultdict(list)
    for response in responses:
        groups[response.prompt].append(response)
    return dict(groups)


def check_pairs(a: Sequence[Response], b: Sequence[Response]) -> None:
    """Raise CMEError unless both sides answer the same prompts."""
    first, second = by_prompt(a).keys(), by_prompt(b).keys()
    for side, missing in (("B", first - second), ("A", second - first)):
        if missing:
            raise CMEError(
                f"{len(missing)} prompts have no response of {side}, such as {min(missing)[:80]!r}: "
                "give both sides the same prompts"
            )
    if not first:
        raise CMEError("there are no responses to compare")


def text_metrics(responses: Sequence[Response], counts: Mapping[str, int]) -> Means:
    """The metrics of text alone. `distinct_n`, which falls with the number of responses, is over the first
    `counts[prompt]` of a prompt together."""
    means: Means = defaultdict(dict)
    for prompt, group in by_prompt(responses).items():
        values: dict[str, list[float | None]] = defaultdict(list)
        for response in group:
            for name, value in _of_response(response).items():
                values[name].append(value)
        for n in (1, 2):
            values[f"distinct_{n}"].append(distinct_rate([r.text for r in group[: counts[prompt]]], n))
        for name, some in values.items():
            known = [v for v in some if v is not None]
            if known:
                means[name][prompt] = sum(known) / len(known)
    return dict(means)


def common_counts(a: Sequence[Response], b: Sequence[Response]) -> dict[str, int]:
    """How many responses to each prompt both sides have."""
    first, second = by_prompt(a), by_prompt(b)
    return {prompt: min(len(group), len(second[prompt])) for prompt, group in first.items()}


def _of_response(response: Response) -> dict[str, float | None]:
    finished = response.finished
    return {
        "tokens": response.tokens,
        "words": float(len(words(response.text))),
        "bytes": float(len(response.text.encode(errors="surrogatepass"))),
        "finished_rate": None if finished is None else float(finished),
        "truncated_rate": None if finished is None else float(not finished),
        "empty_rate": float(not response.text.strip()),
        **diagnose(response.prompt, response.text),
    }


def compare(a: Mapping[str, Mapping[str, float]], b: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """A row for each metric that a side has, in their order."""
    return [_row(name, a.get(name, {}), b.get(name, {})) for name in dict.fromkeys([*a, *b])]


def _row(name: str, a: Mapping[str, float], b: Mapping[str, float]) -> Row:
    common = [prompt for prompt in a if prompt in b]
    if common:
        a, b = ({prompt: side[prompt] for prompt in common} for side in (a, b))
    changes = [b[prompt] - a[prompt] for prompt in common]
    return Row(name, _mean(list(a.values())), _mean(list(b.values())), _mean(changes), mean_interval(changes))


def byte_drift(a: Sequence[Response], b: Sequence[Response]) -> dict[str, Any]:
    """Jensen-Shannon divergence, in bits, of the sides' byte histograms (`cme.diagnostics.jensen_shannon`),
    its interval over prompts, and the same between two halves of A's prompts: what no change at all may give."""
    first, second = by_prompt(a), by_prompt(b)
    prompts = list(first)
    counts_a, counts_b = (
        np.stack([byte_counts([r.text for r in s[p]]) for p in prompts]) for s in (first, second)
    )
    value = jensen_shannon(counts_a.sum(0), counts_b.sum(0))
    halves = jensen_shannon(counts_a[::2].sum(0), counts_a[1::2].sum(0))
    interval = bootstrap(
        lambda rows: jensen_shannon(counts_a[rows].sum(0), counts_b[rows].sum(0)),
        len(prompts),
        resamples=_RESAMPLES_OF_DRIFT,
    )
    return {"value": _finite(value), "interval_95": interval, "halves_of_a": _finite(halves)}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
