"""Bootstrap intervals against textbook results."""

import math

import numpy as np
import pytest

from cme.evaluation.statistics import bootstrap, logistic_regression, mean_interval, sign_test


def test_mean_interval_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(size=400)
    low, high = mean_interval(values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)


def test_no_units_and_no_spread():
    assert mean_interval([]) is None
    assert mean_interval([0.25]) == (0.25, 0.25)


def test_undefined_samples_are_left_out():
    assert bootstrap(lambda rows: math.nan, 3, resamples=20) is None
    values = np.array([math.nan, 1.0])
    assert bootstrap(lambda rows: float(values[rows].mean()), 2, resamples=200) == (1.0, 1.0)


def test_the_level_is_the_share_of_samples_within():
    values = np.random.default_rng(1).random(50)
    wide, narrow = mean_interval(values, level=0.99), mean_interval(values, level=0.5)
    assert wide[0] < narrow[0] < values.mean() < narrow[1] < wide[1]


def test_the_sign_test_is_exact():
    assert sign_test(0, 0) == sign_test(3, 3) == 1
    assert sign_test(5, 0) == sign_test(0, 5) == pytest.approx(2 / 32)


def test_the_regression_has_the_highest_posterior_density():
    rng = np.random.default_rng(0)
    features = np.stack([rng.normal(size=50), np.ones(50)], axis=1)
    shares, precision = rng.random(50), np.array([4.0, 0.01])
    found = logistic_regression(features, shares, precision)
    predicted = 1 / (1 + np.exp(-features @ found))
    assert features.T @ (shares - predicted) == pytest.approx(precision * found, abs=1e-6)  # gradient 0
    always = logistic_regression(features, np.ones(50), precision)
    assert np.isfinite(always).all()
    assert logistic_regression(0 * features, shares, precision) == pytest.approx(np.zeros(2))
