"""Outcomes of comparisons -> win rates, with what is needed to doubt them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cme.errors import DatasetError
from cme.evaluation.statistics import bootstrap, logistic_regression, mean, mean_interval, sign_test
from cme.evaluation.winrate.verdict import Verdict

LC_RESAMPLES = 1000
"""Each is a regression."""

FIRST_SHARE: dict[Verdict, float] = {"first": 1.0, "tie": 0.5, "second": 0.0}
"""Part of the win that a verdict gives to the response that was shown first."""

_PRIOR_PRECISION = (0.01, 0.04)
"""Prior precisions of intercept and slope, which are normal around 0, with standard deviations 10 and 5: so both
stay finite where a model always wins. A narrower one leaves a part of length's effect in the result where prompts
are few."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """The outcome for one prompt of the comparison of a model A with a model B.

    Attributes:
        share: A's part of the win, the mean over both orders, in [0, 1]; None if the judge failed in one of them.
        length_a, length_b: characters of the responses; None if they are not known.
        orders: the verdicts with A shown first, and with B shown first. None where one is not known, or no judge
            was asked because the responses are identical.
    """

    share: float | None
    length_a: int | None
    length_b: int | None
    orders: tuple[Verdict, Verdict] | None = None
    identical: bool = False

    @staticmethod
    def of(annotation: Mapping[str, Any], where: str) -> Outcome:
        """From an annotation as AlpacaEval writes it, or as we do, with the verdicts of both orders.

        `output_1` is the reference's, which is B here, `output_2` the model's, which is A. `preference` is 1 for
        the first, 2 for the second, 1.5 for a tie, anything between for a judge that gives probabilities, null for
        a failure, as is NaN. Raises DatasetError, which says `where`, if it has another value.
        """
        if "preference" not in annotation:
            raise DatasetError(f"{where} has no preference: is it a file of annotations, not of outputs?")
        a, b = annotation.get("output_2"), annotation.get("output_1")
        length_a, length_b = (len(output) if isinstance(output, str) else None for output in (a, b))
        verdicts = (annotation.get(f"verdict_{who}_shown_first") for who in ("model", "reference"))
        a_first, b_first = (_VERDICTS.get(str(verdict)) for verdict in verdicts)
        orders = (a_first, b_first) if a_first and b_first else None
        share = _share(annotation["preference"], where)
        return Outcome(share, length_a, length_b, orders, identical=a is not None and a == b)


_VERDICTS: dict[str, Verdict] = {verdict: verdict for verdict in FIRST_SHARE}


def _share(preference: Any, where: str) -> float | None:
    if preference is None or preference != preference:
        return None
    if type(preference) not in (int, float) or not (preference == 0 or 1 <= preference <= 2):
        raise DatasetError(f"{where} has the preference {preference!r}: it must be a number from 1 to 2, or null")
    return 0.5 if preference == 0 else preference - 1  # early annotations have 0 for a tie


def share_of(a_first: Verdict | None, b_first: Verdict | None) -> float | None:
    """A's part of the win, from the verdicts with A shown first and with B shown first. None if either is missing:
    one order alone would carry the judge's position bias."""
    if a_first is None or b_first is None:
        return None
    return (FIRST_SHARE[a_first] + 1 - FIRST_SHARE[b_first]) / 2


def comparisons(annotations: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The numbers of each comparison by `A vs B`, from pairs of where an annotation is and the annotation."""
    outcomes: dict[str, list[Outcome]] = {}
    for where, row in annotations:
        name = f"{row.get('generator_2', 'A')} vs {row.get('generator_1', 'B')}"
        outcomes.setdefault(name, []).append(Outcome.of(row, where))
    return {name: summarize(found) for name, found in outcomes.items()}


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The numbers of a comparison, rates in [0, 1]; None where something can't be computed.

    Intervals are 95 % bootstrap intervals over prompts.
    """
    judged = [o for o in outcomes if o.share is not None]
    shares = np.array([o.share for o in judged], dtype=np.float64)
    failed = len(outcomes) - len(judged)
    wins, losses = int((shares > 0.5).sum()), int((shares < 0.5).sum())
    return {
        "prompts": len(outcomes),
        "failed": failed,
        "identical": sum(o.identical for o in outcomes),
        "wins": wins,
        "ties": len(judged) - wins - losses,
        "losses": losses,
        "win_rate": mean(shares),
        "win_rate_interval_95": mean_interval(shares.tolist()),
        "win_rate_failures_as_ties": (float(shares.sum()) + failed / 2) / len(outcomes) if judged else None,
        "sign_test_p": sign_test(wins, losses),
        **_length_controlled(judged),
        **_orders([o.orders for o in judged if o.orders is not None]),
        "mean_length_a": mean([o.length_a for o in judged if o.length_a is not None]),
        "mean_length_b": mean([o.length_b for o in judged if o.length_b is not None]),
        "empty_a": sum(o.length_a == 0 for o in outcomes),
        "empty_b": sum(o.length_b == 0 for o in outcomes),
    }


def length_controlled(shares: Array, gaps: Array) -> float:
    """The win rate that a logistic regression of the preference on the length predicts for equal lengths.

    P(win) = sigmoid(intercept + slope * gap), whose value at gap 0 is sigmoid(intercept), as in AlpacaEval 2
    (Dubois et al. 2024, https://arxiv.org/abs/2404.04475), without its term for an instruction's difficulty. The
    coefficients maximise the posterior density under normal priors.

    Args:
        shares: preference for the model, in [0, 1], one per prompt.
        gaps: tanh of the standardised difference of lengths, as `length_gaps` gives it.
    """
    features = np.stack([np.ones_like(gaps), gaps], axis=1)
    intercept, _ = logistic_regression(features, shares, _PRIOR_PRECISION)
    return float(1 / (1 + np.exp(-intercept)))


def length_gaps(length_a: Array, length_b: Array) -> Array:
    """tanh((A's length - B's) / its standard deviation over prompts); 0 where lengths never differ."""
    difference = length_a - length_b
    deviation = difference.std(ddof=1) if len(difference) > 1 else 0.0
    return np.asarray(np.tanh(difference / deviation)) if deviation > 0 else np.zeros_like(difference)


def _length_controlled(judged: Sequence[Outcome]) -> dict[str, Any]:
    known = [
        (o.share, o.length_a, o.length_b) for o in judged if o.length_a is not None and o.length_b is not None
    ]
    rate = interval = None
    if len(known) >= 2 and len(known) == len(judged):
        shares, lengths_a, lengths_b = np.array(known, dtype=np.float64).T
        gaps = length_gaps(lengths_a, lengths_b)
        rate = length_controlled(shares, gaps)
        interval = bootstrap(
            lambda rows: length_controlled(shares[rows], gaps[rows]), len(shares), resamples=LC_RESAMPLES
        )
    return {"length_controlled_win_rate": rate, "length_controlled_win_rate_interval_95": interval}


def _orders(orders: Sequence[tuple[Verdict, Verdict]]) -> dict[str, Any]:
    """Agreement of both orders, and the part of decided verdicts that went to the first position."""
    to_first = np.array([[FIRST_SHARE[verdict] for verdict in pair] for pair in orders]).reshape(-1, 2)
    firsts, decided = (to_first == 1).sum(axis=1), (to_first != 0.5).sum(axis=1)  # (prompts,)

    def share(rows: NDArray[np.intp]) -> float:
        total = decided[rows].sum()
        return float(firsts[rows].sum() / total) if total else math.nan

    return {
        "order_agreement": mean(to_first[:, 0] == 1 - to_first[:, 1]),
        "first_position_share": float(firsts.sum() / decided.sum()) if decided.sum() else None,
        "first_position_share_interval_95": bootstrap(share, len(orders), resamples=LC_RESAMPLES),
    }
