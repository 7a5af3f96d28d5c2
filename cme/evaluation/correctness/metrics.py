"""How well a signal tells right responses from wrong. Higher values mean "more likely right"; ties count half.

Arrays have one entry a response: `values` float64 [N], `correct` bool [N], `question` int [N], numbers in [0, Q).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.intp]


def auroc(values: Floats, correct: Bools, weights: Floats | None = None) -> Floats:
    """Area under the ROC curve: P(a right response has a higher value than a wrong one).

    Args:
        weights: [R, N], the weights of the responses in each of R samples; default one sample, each once.

    Returns:
        [R]; NaN for a sample without right responses, or without wrong ones.
    """
    order = np.argsort(values, kind="stable")
    starts = _tie_starts(values[order])
    right = correct[order].astype(np.float64)[None]
    wrong = 1 - right
    if weights is not None:
        weights = weights[:, order]
        right, wrong = right * weights, wrong * weights
    right = np.add.reduceat(right, starts, axis=1)  # [R, distinct values]
    wrong = np.add.reduceat(wrong, starts, axis=1)
    below = wrong.cumsum(axis=1) - wrong / 2
    total = right.sum(axis=1) * wrong.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return np.asarray((right * below).sum(axis=1) / np.where(total > 0, total, np.nan))


def pair_accuracy(values: Floats, correct: Bools, question: Ints) -> Floats:
    """For each question with right and wrong responses: the share of its (right, wrong) pairs in which the right
    one has the higher value."""
    shares = []
    for rows in _by_question(question):
        right, wrong = values[rows][correct[rows]], values[rows][~correct[rows]]
        if len(right) and len(wrong):
            difference = right[:, None] - wrong[None]
            shares.append(((difference > 0) + 0.5 * (difference == 0)).mean())
    return np.array(shares, dtype=np.float64)


def best_of_n(values: Floats, correct: Bools, question: Ints) -> Floats:
    """For each question with two responses or more: whether the one with the highest value is right; the share of
    right ones where several have it."""
    chosen = [
        correct[rows][values[rows] == values[rows].max()].mean()
        for rows in _by_question(question)
        if len(rows) > 1
    ]
    return np.array(chosen, dtype=np.float64)


def mean_and_oracle(correct: Bools, question: Ints) -> tuple[Floats, Floats]:
    """For each question with two responses or more: the share of right ones, and whether any is right."""
    several = [correct[rows] for rows in _by_question(question) if len(rows) > 1]
    mean = np.array([each.mean() for each in several], dtype=np.float64)
    return mean, np.array([each.any() for each in several], dtype=np.float64)


def selective_accuracy(values: Floats, correct: Bools) -> Floats:
    """[N]: the accuracy of the 1, 2, …, N responses with the highest values; the expected one within ties."""
    order = np.argsort(-values, kind="stable")
    starts = _tie_starts(values[order])
    sizes = np.diff([*starts, len(values)])
    expected = np.repeat(np.add.reduceat(correct[order].astype(np.float64), starts) / sizes, sizes)
    return np.asarray(expected.cumsum() / np.arange(1, len(values) + 1))


def risk_area(accuracies: Floats) -> float:
    """Area under the risk-coverage curve (AURC): the mean error rate over all coverages; lower is better."""
    return float(1 - accuracies.mean())


def _tie_starts(ordered: Floats) -> Ints:
    """Where each run of equal values starts."""
    return np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))


def _by_question(question: Ints) -> Iterator[Ints]:
    """The rows of each question, in the order of the questions' numbers."""
    order = np.argsort(question, kind="stable")
    ends = np.flatnonzero(np.diff(question[order])) + 1
    yield from (rows for rows in np.split(order, ends) if len(rows))
