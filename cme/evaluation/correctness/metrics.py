"""Metrics of a signal. Higher values mean "more likely right"; ties count half.

Arrays have one entry per response: `values` float64 [N], `correct` bool [N], `question` int [N] in [0, Q).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cme.evaluation.statistics import Floats, logistic_regression

Bools = NDArray[np.bool_]
Ints = NDArray[np.intp]

FOLDS = 5
MAX_BINS = 10
BIN_SIZE = 20
"""Responses in a bin at least: the fewer, the more of the error is chance."""


def auroc(values: Floats, correct: Bools, weights: Floats | None = None) -> Floats:
    """Area under the ROC curve: P(a right response has a higher value than a wrong one).

    Like scikit-learn's, for all samples of a bootstrap at once, which it would take minutes for.

    Args:
        weights: [R, N], the weights of the responses in each of R samples; default one sample, each once.

    Returns:
        [R]; NaN for a sample without right responses, or without wrong ones.
    """
    order = np.argsort(values, kind="stable")
    starts = _tie_starts(values[order])
    each = np.ones((1, len(values))) if weights is None else weights[:, order]
    right = np.add.reduceat(each * correct[order], starts, axis=1)  # [R, distinct values]
    wrong = np.add.reduceat(each * ~correct[order], starts, axis=1)
    below = wrong.cumsum(axis=1) - wrong / 2
    total = right.sum(axis=1) * wrong.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return np.asarray((right * below).sum(axis=1) / np.where(total > 0, total, np.nan))


def pair_accuracy(values: Floats, correct: Bools, question: Ints) -> Floats:
    """For each question with right and wrong responses: the share of its (right, wrong) pairs in which the right
    one has the higher value."""
    areas = [auroc(values[rows], correct[rows])[0] for rows in by_question(question)]
    return np.array([area for area in areas if not np.isnan(area)], dtype=np.float64)


def best_of_n(values: Floats, correct: Bools, question: Ints) -> Floats:
    """For each question with two responses or more: whether the one with the highest value is right; the share of
    right ones where several have it."""
    several = [(values[rows], correct[rows]) for rows in by_question(question) if len(rows) > 1]
    return np.array([right[value == value.max()].mean() for value, right in several], dtype=np.float64)


def mean_and_oracle(correct: Bools, question: Ints) -> tuple[Floats, Floats]:
    """For each question with two responses or more: the share of right ones, and whether any is right."""
    several = [correct[rows] for rows in by_question(question) if len(rows) > 1]
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


def by_question(question: Ints) -> Iterator[Ints]:
    """The rows of each question, in the order of the questions' numbers."""
    order = np.argsort(question, kind="stable")
    ends = np.flatnonzero(np.diff(question[order])) + 1
    yield from (rows for rows in np.split(order, ends) if len(rows))


def _tie_starts(ordered: Floats) -> Ints:
    """Where each run of equal values starts."""
    return np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))


def calibrate(values: Floats, correct: Bools, question: Ints, seed: int = 0) -> dict[str, Any] | None:
    """A signal as a probability of being right, and how far that is from what happens.

    A signal is no probability, so Platt's method makes it one; every response's probability comes from a curve
    that was fitted without its question.

    Returns:
        None with fewer than two questions, or if all responses are right or all wrong. Else:
        ece: expected calibration error, over bins with equally many responses.
        brier: mean squared difference of probability and label.
        brier_of_base_rate: the same for the accuracy of the other folds instead of the signal.
        brier_skill: share of that which the signal saves; 0 or less says that it helps nothing.
        reliability: the bins.
    """
    questions = np.unique(question)
    if len(questions) < 2 or correct.all() or not correct.any():
        return None
    folds = np.array_split(np.random.default_rng(seed).permutation(questions), min(FOLDS, len(questions)))
    probability, base_rate = np.empty(len(values)), np.empty(len(values))
    for fold in folds:
        held_out = np.isin(question, fold)
        slope, intercept = platt(values[~held_out], correct[~held_out])
        probability[held_out] = 1 / (1 + np.exp(-(slope * values[held_out] + intercept)))
        base_rate[held_out] = correct[~held_out].mean()
    bins = reliability(probability, correct)
    brier, of_base_rate = (float(((p - correct) ** 2).mean()) for p in (probability, base_rate))
    return {
        "ece": sum(abs(b["probability"] - b["accuracy"]) * b["responses"] for b in bins) / len(values),
        "brier": brier,
        "brier_of_base_rate": of_base_rate,
        "brier_skill": 1 - brier / of_base_rate,
        "reliability": bins,
    }


def platt(values: Floats, correct: Bools) -> tuple[float, float]:
    """(slope, intercept) of the logistic curve with the highest likelihood of smoothed labels (Platt 1999)."""
    right, wrong = int(correct.sum()), int((~correct).sum())
    target = np.where(correct, (right + 1) / (right + 2), 1 / (wrong + 2))
    centre, scale = values.mean(), values.std() or 1.0
    design = np.stack([(values - centre) / scale, np.ones(len(values))], axis=1)
    slope, intercept = logistic_regression(design, target, precision=(1e-9, 1e-9)) / (scale, 1)
    return float(slope), float(intercept - slope * centre)


def reliability(probability: Floats, correct: Bools) -> list[dict[str, Any]]:
    """The mean probability, the accuracy and the responses of bins that hold equally many, in order."""
    order = np.argsort(probability, kind="stable")
    parts = np.array_split(order, min(MAX_BINS, max(1, len(order) // BIN_SIZE)))
    return [
        {"probability": float(probability[p].mean()), "accuracy": float(correct[p].mean()), "responses": len(p)}
        for p in parts
    ]
