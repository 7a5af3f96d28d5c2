"""Bootstrap intervals (Efron 1979), over what was drawn independently: questions, not their responses; and a sign
test, and a logistic regression of shares. scipy takes a second to import."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 10_000

Interval = tuple[float, float]

_MAX_VALUES = 2**22
"""Numbers in one array of resamples: 32 MB."""


def mean(values: Sequence[float] | Floats) -> float | None:
    """The mean; None if there are no values."""
    return float(np.mean(values)) if len(values) else None


def mean_interval(
    values: Sequence[float] | Floats, level: float = LEVEL, resamples: int = RESAMPLES
) -> Interval | None:
    """Percentile interval of the mean of independent values; None if there are none."""
    data = np.asarray(values, dtype=np.float64)
    if not len(data):
        return None
    means = [counts @ data / len(data) for counts in resample(len(data), resamples)]
    return percentile_interval(np.concatenate(means), level)


def resample(num_units: int, resamples: int = RESAMPLES, seed: int = 0, width: int = 1) -> Iterator[Floats]:
    """Counts of each unit in each of the samples of a bootstrap, float64 [some of them, num_units] at a time.

    Statistics that take weights are computed for many samples at once with it. `width` is how many values the
    caller makes of a unit, so that its arrays stay small too.
    """
    rng = np.random.default_rng(seed)
    rows = max(1, _MAX_VALUES // (num_units * width))
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = rng.integers(num_units, size=(count, num_units)) + num_units * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * num_units).reshape(count, num_units).astype(np.float64)


def percentile_interval(samples: Floats, level: float = LEVEL) -> Interval | None:
    """The bounds of the middle `level` of bootstrap samples, those that are NaN left out; None if all are."""
    known = samples[~np.isnan(samples)]
    if not len(known):
        return None
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap(
    statistic: Callable[[NDArray[np.intp]], float],
    num_units: int,
    resamples: int = RESAMPLES,
) -> Interval | None:
    """Percentile interval of a statistic of independent units, resampled with replacement.

    Args:
        statistic: takes the numbers, in [0, num_units), of the units in a sample. Samples for which it is NaN
            are left out.

    Returns:
        The bounds; None if there are no units, or the statistic is NaN for every sample.
    """
    if num_units == 0:
        return None
    rng = np.random.default_rng(0)
    values = np.array([statistic(rng.integers(num_units, size=num_units)) for _ in range(resamples)])
    return percentile_interval(values)


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p-value of the hypothesis that a pair that isn't tied is as likely won as lost."""
    from scipy.stats import binomtest  # takes a second to import

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def logistic_regression(features: Floats, shares: Floats, precision: Sequence[float]) -> Floats:
    """The coefficients [K] of P(right) = sigmoid(features @ coefficients) with the highest posterior density.

    Args:
        features: [N, K]; a column of ones is the intercept.
        shares: [N], in [0, 1]: a share counts in part as right, in part as wrong.
        precision: [K], one over the variance of each coefficient's normal prior around 0. At least a little, so
            that all stay finite.
    """
    from scipy.optimize import root
    from scipy.special import expit

    # The zero of the gradient of the log-posterior, which is strictly concave
    def gradient(coefficients: Floats) -> Floats:
        return features.T @ (shares - expit(features @ coefficients)) - np.asarray(precision) * coefficients

    def curvature(coefficients: Floats) -> Floats:
        predicted = expit(features @ coefficients)
        return -(features.T * (predicted * (1 - predicted))) @ features - np.diag(precision)

    return np.asarray(root(gradient, np.zeros(features.shape[1]), jac=curvature, method="lm", tol=1e-10).x)
