"""A signal as a probability of being right, and how far that is from what happens.

A signal is no probability, so Platt's method makes it one: a logistic curve with two parameters, fitted to the
smoothed labels of his paper (1999). Every response's probability comes from a curve that was fitted without its
question.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cme.evaluation.correctness.metrics import Bools, Floats, Ints

FOLDS = 5
MAX_BINS = 10
BIN_SIZE = 20
"""Responses in a bin at least: the fewer, the more of the error is chance."""


@dataclass(frozen=True)
class Calibration:
    """Attributes:
    ece: expected calibration error, over bins with equally many responses.
    brier: mean squared difference of probability and label.
    brier_base_rate: the same for the accuracy of the other folds instead of the signal.
    bins: (mean probability, accuracy, responses) of each bin.
    """

    ece: float
    brier: float
    brier_base_rate: float
    bins: tuple[tuple[float, float, int], ...]

    @property
    def skill(self) -> float:
        """Share of the base rate's Brier score that the signal saves; 0 or less says that it helps nothing."""
        return 1 - self.brier / self.brier_base_rate


def calibrate(values: Floats, correct: Bools, question: Ints, seed: int = 0) -> Calibration | None:
    """None with fewer than two questions, or if all responses are right or all wrong."""
    questions = np.unique(question)
    if len(questions) < 2 or correct.all() or not correct.any():
        return None
    folds = np.array_split(np.random.default_rng(seed).permutation(questions), min(FOLDS, len(questions)))
    probability, base_rate = np.empty(len(values)), np.empty(len(values))
    for fold in folds:
        held_out = np.isin(question, fold)
        slope, intercept = platt(values[~held_out], correct[~held_out])
        probability[held_out] = _sigmoid(slope * values[held_out] + intercept)
        base_rate[held_out] = correct[~held_out].mean()
    bins = reliability(probability, correct)
    return Calibration(
        ece=sum(abs(p - accuracy) * count for p, accuracy, count in bins) / len(values),
        brier=float(((probability - correct) ** 2).mean()),
        brier_base_rate=float(((base_rate - correct) ** 2).mean()),
        bins=bins,
    )


def platt(values: Floats, correct: Bools) -> tuple[float, float]:
    """(slope, intercept) of the logistic curve with the highest likelihood of the smoothed labels."""
    right, wrong = int(correct.sum()), int((~correct).sum())
    target = np.where(correct, (right + 1) / (right + 2), 1 / (wrong + 2))
    centre, scale = values.mean(), values.std() or 1.0
    design = np.stack([(values - centre) / scale, np.ones(len(values))], axis=1)
    parameters = np.array([0.0, np.log((right + 1) / (wrong + 1))])

    def loss(candidate: Floats) -> float:
        score = design @ candidate
        return float((np.logaddexp(0, score) - target * score).sum())

    for _ in range(100):  # Newton's method; the loss is convex
        p = _sigmoid(design @ parameters)
        gradient = design.T @ (p - target)
        hessian = (design * (p * (1 - p))[:, None]).T @ design + 1e-9 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        while loss(parameters - step) > loss(parameters) and np.abs(step).max() > 1e-12:
            step /= 2
        parameters = parameters - step
        if np.abs(step).max() < 1e-9:
            break
    slope = parameters[0] / scale
    return float(slope), float(parameters[1] - slope * centre)


def reliability(probability: Floats, correct: Bools) -> tuple[tuple[float, float, int], ...]:
    """(mean probability, accuracy, responses) of the bins, which hold equally many responses, in order."""
    order = np.argsort(probability, kind="stable")
    parts = np.array_split(order, min(MAX_BINS, max(1, len(order) // BIN_SIZE)))
    return tuple((float(probability[p].mean()), float(correct[p].mean()), len(p)) for p in parts)


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(0.5 * (1 + np.tanh(x / 2)))
