"""Outcomes of comparisons -> win rates, with what is needed to doubt them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cme.evaluation.statistics import bootstrap, logistic_regression, mean_interval, sign_test
from cme.evaluation.winrate.verdict import Verdict

LC_RESAMPLES = 1000
"""Each is a regression."""

FIRST_SHARE: dict[Verdict, float] = {"first": 1.0, "tie": 0.5, "second": 0.0}
"""Part of the win that a verdict gives to the response that was shown first."""

_PRIOR_PRECISION = (0.01, 0.04)
"""Of intercept and slope, which are normal around 0, with standard deviations 10 and 5: so both stay finite where
a model always wins. A narrower one leaves a part of length's effect in the result where prompts are few."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """The outcome for one prompt of the comparison of a model A with a model B.

    Attributes:
        share: A's part of the win, the mean over both orders, in [0, 1]; None if the judge failed in one of them.
        length_a, length_b: characters of the responses; None if they are not known.
        orders: the verdicts with A shown first, and with B shown first. None where no judge was asked (the
            responses are identical), or its single verdicts are not known.
    """

    share: float | None
    length_a: int | None
    length_b: int | None
    orders: tuple[Verdict | None, Verdict | None] | None = None
    identical: bool = False


def share_of(a_first: Verdict | None, b_first: Verdict | None) -> float | None:
    """A's part of the win, from the verdicts with A shown first and with B shown first. None if either is missing:
    one order alone would carry the judge's position bias."""
    if a_first is None or b_first is None:
        return None
    return (FIRST_SHARE[a_first] + 1 - FIRST_SHARE[b_first]) / 2


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
        "win_rate": _mean(shares),
        "win_rate_interval_95": mean_interval(shares.tolist()),
        "win_rate_failures_as_ties": (float(shares.sum()) + failed / 2) / len(outcomes) if judged else None,
        "sign_test_p": sign_test(wins, losses),
        **_length_controlled(judged),
        **_orders([o.orders for o in judged if o.orders is not None]),
        "mean_length_a": _mean([o.length_a for o in judged if o.length_a is not None]),
        "mean_length_b": _mean([o.length_b for o in judged if o.length_b is not None]),
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


def _orders(orders: Sequence[tuple[Verdict | None, Verdict | None]]) -> dict[str, Any]:
    """Agreement of both orders, and the part of decided verdicts that went to the first position."""
    both = [(a_first, b_first) for a_first, b_first in orders if a_first and b_first]
    decided = [[FIRST_SHARE[v] for v in pair if v and v != "tie"] for pair in orders]
    firsts = np.array([sum(values) for values in decided])
    counts = np.array([len(values) for values in decided])

    def share(rows: NDArray[np.intp]) -> float:
        total = counts[rows].sum()
        return float(firsts[rows].sum() / total) if total else math.nan

    return {
        "order_agreement": _mean([float(FIRST_SHARE[a] == 1 - FIRST_SHARE[b]) for a, b in both]),
        "first_position_share": float(firsts.sum() / counts.sum()) if counts.sum() else None,
        "first_position_share_interval_95": bootstrap(share, len(orders), resamples=LC_RESAMPLES),
    }


def _mean(values: Sequence[float] | Array) -> float | None:
    return float(np.mean(values)) if len(values) else None
