"""What is said of a signal, against its definition spelled out, and against scikit-learn."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.metrics import roc_auc_score

from cme.evaluation.correctness.metrics import (
    auroc,
    best_of_n,
    calibrate,
    mean_and_oracle,
    pair_accuracy,
    platt,
    reliability,
    risk_area,
    selective_accuracy,
)
from cme.evaluation.statistics import mean_interval, percentile_interval, resample


@pytest.fixture
def sample():
    """Values with many ties that are higher for right responses, in 40 questions of 1 to 6 responses."""
    rng = np.random.default_rng(0)
    question = np.repeat(np.arange(40), rng.integers(1, 7, 40))
    correct = rng.random(len(question)) < 0.4
    values = np.round(rng.normal(size=len(question)) + correct, 1)
    shuffled = rng.permutation(len(question))
    return values[shuffled], correct[shuffled], question[shuffled]


def brute_auroc(values, correct):
    pairs = [(r > w) + 0.5 * (r == w) for r in values[correct] for w in values[~correct]]
    return sum(pairs) / len(pairs)


def test_auroc_is_the_share_of_pairs_in_order(sample):
    values, correct, _ = sample
    (area,) = auroc(values, correct)
    assert area == pytest.approx(brute_auroc(values, correct))
    assert auroc(-values, correct) == pytest.approx(1 - area)
    assert auroc(np.zeros(4), np.array([True, False, False, True])) == 0.5


def test_auroc_with_counts_is_that_of_the_sample_with_copies(sample):
    values, correct, question = sample
    (counts,) = resample(40, 5)
    assert (counts.sum(axis=1) == 40).all()
    areas = auroc(values, correct, counts[:, question])
    for row, area in zip(counts, areas, strict=True):
        copies = np.repeat(np.arange(len(values)), row[question].astype(int))
        assert area == pytest.approx(brute_auroc(values[copies], correct[copies]))


def test_auroc_is_that_of_scikit_learn(sample):
    values, correct, _ = sample
    weights = np.random.default_rng(1).random(len(values))
    wanted = roc_auc_score(correct, values, sample_weight=weights)
    assert auroc(values, correct, weights[None]) == pytest.approx(wanted)


def test_auroc_of_one_class_is_undefined():
    values = np.array([1.0, 2.0])
    assert np.isnan(auroc(values, np.array([True, True]))).all()
    half = auroc(values, np.array([True, False]), np.array([[1.0, 0.0], [1.0, 1.0]]))
    assert math.isnan(half[0])
    assert half[1] == 0


def test_pairs_are_those_within_a_question():
    values = np.array([9.0, 5.0, 5.0, 1.0, 2.0, 3.0])
    correct = np.array([False, True, False, True, True, True])
    question = np.array([0, 0, 0, 1, 2, 2])
    # Question 0: one right at 5 against wrong ones at 9 and 5; the others have no pair
    assert pair_accuracy(values, correct, question) == pytest.approx([0.25])
    assert len(pair_accuracy(values, np.ones(6, bool), question)) == 0


def test_best_of_n_against_mean_and_oracle():
    values = np.array([1.0, 3.0, 3.0, 7.0, 0.0, 1.0])
    correct = np.array([True, True, False, False, True, False])
    question = np.array([4, 4, 4, 5, 6, 6])
    assert best_of_n(values, correct, question) == pytest.approx([0.5, 0.0])  # question 5 has one response
    mean, oracle = mean_and_oracle(correct, question)
    assert mean == pytest.approx([2 / 3, 1 / 2])
    assert oracle == pytest.approx([1, 1])


def test_per_question_metrics_do_not_depend_on_the_order_of_rows(sample):
    values, correct, question = sample
    order = np.argsort(question, kind="stable")
    for metric in (pair_accuracy, best_of_n):
        assert metric(values, correct, question) == pytest.approx(
            metric(values[order], correct[order], question[order])
        )


def test_selective_accuracy_keeps_the_highest_values_first():
    values = np.array([1.0, 4.0, 3.0, 3.0])
    correct = np.array([False, True, False, True])
    accuracies = selective_accuracy(values, correct)
    assert accuracies == pytest.approx([1, 1.5 / 2, 2 / 3, 2 / 4])
    assert risk_area(accuracies) == pytest.approx(1 - (1 + 0.75 + 2 / 3 + 0.5) / 4)
    assert risk_area(selective_accuracy(np.zeros(4), correct)) == 0.5


def test_platt_recovers_the_curve_that_made_the_labels():
    rng = np.random.default_rng(0)
    values = rng.normal(3, 2, 20_000)
    correct = rng.random(20_000) < 1 / (1 + np.exp(-(1.5 * values - 4)))
    assert platt(values, correct) == pytest.approx((1.5, -4), abs=0.15)
    assert platt(-values, correct) == pytest.approx((-1.5, -4), abs=0.15)


def test_platt_is_finite_for_separated_and_for_constant_values():
    correct = np.array([False, False, True, True])
    slope, intercept = platt(np.array([1.0, 2.0, 3.0, 4.0]), correct)
    assert slope > 0
    assert 1 / (1 + math.exp(-(4 * slope + intercept))) < 0.95  # labels are smoothed: no certainty from four
    slope, intercept = platt(np.full(4, 7.0), correct)
    assert 1 / (1 + math.exp(-(7 * slope + intercept))) == pytest.approx(0.5)


def test_platt_maximises_the_likelihood_of_smoothed_labels():
    rng = np.random.default_rng(2)
    values = rng.normal(size=300)
    correct = rng.random(300) < 1 / (1 + np.exp(-values))
    right, wrong = correct.sum(), (~correct).sum()
    target = np.where(correct, (right + 1) / (right + 2), 1 / (wrong + 2))

    def loss(parameters):
        score = parameters[0] * values + parameters[1]
        return (np.logaddexp(0, score) - target * score).sum()

    assert platt(values, correct) == pytest.approx(minimize(loss, (0, 0), tol=1e-10).x, abs=1e-5)


def test_a_signal_without_information_has_no_skill():
    rng = np.random.default_rng(3)
    question = np.repeat(np.arange(300), 4)
    correct = rng.random(1200) < 0.3
    noise = calibrate(rng.normal(size=1200), correct, question)
    telling = calibrate(rng.normal(size=1200) + 3 * correct, correct, question)
    assert -0.03 < noise["brier_skill"] < 0.01
    assert telling["brier_skill"] > 0.4
    assert telling["ece"] < 0.05
    assert noise["brier_of_base_rate"] == pytest.approx(correct.mean() * (1 - correct.mean()), rel=0.02)


def test_probabilities_come_from_other_questions():
    # One value a question, right for half of the questions: a curve that saw its label would know it
    question = np.repeat(np.arange(10), 50)
    correct = question % 2 == 0
    values = np.where(correct, 1.0, -1.0) * np.where(question < 5, 1, -1)
    assert calibrate(values, correct, question)["brier_skill"] < 0.3


def test_calibration_needs_two_questions_and_both_labels():
    values, question = np.arange(4.0), np.array([0, 0, 1, 1])
    assert calibrate(values, np.ones(4, bool), question) is None
    assert calibrate(values, np.zeros(4, bool), question) is None
    assert calibrate(values, np.array([True, False, True, False]), np.zeros(4, int)) is None
    assert calibrate(values, np.array([True, False, True, False]), question) is not None


def test_reliability_bins_hold_equally_many():
    probability = np.linspace(0, 1, 65)
    bins = reliability(probability, probability > 0.5)
    assert [b["responses"] for b in bins] == [22, 22, 21]
    assert (bins[0]["probability"], bins[0]["accuracy"]) == pytest.approx((probability[:22].mean(), 0))
    assert bins[-1]["accuracy"] == 1
    many = reliability(np.linspace(0, 1, 305), np.ones(305, bool))
    assert [b["responses"] for b in many] == [31] * 5 + [30] * 5
    assert len(reliability(probability[:3], np.ones(3, bool))) == 1


def test_intervals_are_those_of_resampled_questions(sample):
    values, correct, question = sample
    areas = np.concatenate([auroc(values, correct, c[:, question]) for c in resample(40, 2000, width=10)])
    assert len(areas) == 2000
    low, high = percentile_interval(areas)
    assert low < auroc(values, correct)[0] < high
    assert mean_interval(best_of_n(values, correct, question)) is not None
    assert percentile_interval(np.array([math.nan, math.nan])) is None


def test_resampling_comes_in_parts_that_are_small():
    parts = list(resample(1000, 50, width=2**20 // 1000 * 4))
    assert sum(len(part) for part in parts) == 50
    assert max(len(part) for part in parts) < 3
