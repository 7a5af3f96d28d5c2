"""Bootstrap intervals (Efron 1979), over what was drawn independently: questions, not their responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES = 10_000

Interval = tuple[float, float]


def mean_interval(values: Sequence[float], level: float = LEVEL, resamples: int = RESAMPLES) -> Interval | None:
    """Percentile interval of the mean of independent values; None if there are none."""
    data = np.asarray(values, dtype=np.float64)
    return bootstrap(lambda rows: float(data[rows].mean()), len(data), level, resamples)


def bootstrap(
    statistic: Callable[[NDArray[np.intp]], float],
    num_units: int,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
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
    rng = np.random.default_rng(seed)
    values = np.array([statistic(rng.integers(num_units, size=num_units)) for _ in range(resamples)])
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
