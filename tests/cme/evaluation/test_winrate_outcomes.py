"""Win rates, against counting by hand and against data whose truth is known."""

import numpy as np
import pytest

from cme.evaluation.winrate.outcomes import (
    Outcome,
    length_controlled,
    length_gaps,
    share_of,
    summarize,
)
from cme.evaluation.winrate.report import remarks


def outcome(share, length_a=10, length_b=10, orders=None, identical=False):
    return Outcome(share, length_a, length_b, orders, identical)


def test_the_share_is_the_mean_over_both_orders():
    assert share_of("first", "second") == 1.0  # first when shown first, and the other is not when that is first
    assert share_of("first", "first") == 0.5  # whoever is first wins
    assert share_of("tie", "second") == 0.75
    assert share_of("second", "tie") == 0.25
    assert share_of(None, "second") is None
    assert share_of("first", None) is None


@pytest.mark.parametrize(
    ("wins", "losses", "p"), [(0, 0, 1.0), (5, 0, 0.0625), (8, 2, 0.109375), (2, 8, 0.109375), (3, 3, 1.0)]
)
def test_the_sign_test_is_the_binomial_one(wins, losses, p):
    numbers = summarize([outcome(1.0)] * wins + [outcome(0.5)] * 3 + [outcome(0.0)] * losses)
    assert numbers["sign_test_p"] == pytest.approx(p)


def test_failures_are_left_out_and_shown_as_the_ties_that_others_make_of_them():
    numbers = summarize([outcome(1.0), outcome(0.75), outcome(0.5), outcome(None)])
    assert numbers["win_rate"] == pytest.approx(0.75)
    assert numbers["win_rate_failures_as_ties"] == pytest.approx(2.75 / 4)
    assert (numbers["prompts"], numbers["failed"]) == (4, 1)
    assert (numbers["wins"], numbers["ties"], numbers["losses"]) == (2, 1, 0)


def test_nothing_judged_is_no_win_rate():
    numbers = summarize([outcome(None)])
    assert numbers["win_rate"] is None
    assert numbers["win_rate_interval_95"] is None
    assert numbers["win_rate_failures_as_ties"] is None  # not 50 %
    assert remarks(numbers)[0] == "There is no verdict: the judge failed on all of the 1 prompts."
    assert numbers["length_controlled_win_rate"] is None
    assert numbers["order_agreement"] is None
    assert numbers["sign_test_p"] == 1.0


def test_agreement_and_position_bias():
    numbers = summarize(
        [
            outcome(1.0, orders=("first", "second")),  # A in both
            outcome(0.0, orders=("second", "first")),  # B in both
            outcome(0.5, orders=("tie", "tie")),  # agrees, and decides for no position
            outcome(0.5, orders=("first", "first")),  # whoever is first
            outcome(None, orders=("second", "first")),  # failed: left out
        ]
    )
    assert numbers["order_agreement"] == pytest.approx(3 / 4)
    assert numbers["first_position_share"] == pytest.approx(4 / 6)


def test_lengths_empty_and_identical_responses_are_counted():
    numbers = summarize([outcome(1.0, 0, 30), outcome(0.5, 20, 10, identical=True), outcome(None, 0, 0)])
    assert (numbers["mean_length_a"], numbers["mean_length_b"]) == (10, 20)
    assert (numbers["empty_a"], numbers["empty_b"], numbers["identical"]) == (2, 1, 1)


def simulated(advantage, effect, mean_difference, n=1500):
    """Outcomes of a judge whose log-odds for A are `advantage`, and `effect` times the gap in length."""
    rng = np.random.default_rng(1)
    length_b = rng.integers(100, 900, n)
    length_a = np.maximum(1, length_b + rng.normal(mean_difference, 200, n)).astype(int)
    gaps = length_gaps(length_a.astype(float), length_b.astype(float))
    wins = rng.random(n) < 1 / (1 + np.exp(-(advantage + effect * gaps)))
    return [outcome(float(w), int(a), int(b)) for w, a, b in zip(wins, length_a, length_b, strict=True)]


def test_a_gain_that_is_length_vanishes_at_equal_length():
    numbers = summarize(simulated(advantage=0.0, effect=1.5, mean_difference=200))
    assert numbers["win_rate_interval_95"][0] > 0.65
    low, high = numbers["length_controlled_win_rate_interval_95"]
    assert low < 0.5 < high
    assert high - low < 0.2


@pytest.mark.parametrize("effect", [1.5, 3.0])
def test_few_prompts_leave_no_effect_of_length_in_the_mean(effect):
    rng, found = np.random.default_rng(0), []
    for _ in range(100):
        gaps = length_gaps(rng.normal(1300, 200, 80), rng.normal(1000, 220, 80))  # a standard deviation longer
        wins = rng.random(80) < 1 / (1 + np.exp(-effect * gaps))
        found.append(length_controlled(wins.astype(float), gaps))
    assert np.mean(found) == pytest.approx(0.5, abs=0.035)


def test_a_gain_despite_length_shows_at_equal_length():
    numbers = summarize(simulated(advantage=1.0, effect=1.5, mean_difference=-200))
    assert numbers["win_rate"] < 0.55
    assert numbers["length_controlled_win_rate"] == pytest.approx(1 / (1 + np.exp(-1.0)), abs=0.05)
    assert numbers["length_controlled_win_rate_interval_95"][0] > 0.6


def test_equal_lengths_change_nothing():
    shares = [1.0, 1.0, 0.5, 0.0, 0.75] * 20
    numbers = summarize([outcome(s, 7, 7) for s in shares])
    assert numbers["length_controlled_win_rate"] == pytest.approx(numbers["win_rate"], abs=1e-3)


def test_a_model_that_always_wins_has_a_finite_fit():
    gaps = np.linspace(-1, 1, 30)
    assert 0.98 < length_controlled(np.ones(30), gaps) < 1
    assert 0.3 < length_controlled((gaps > 0).astype(float), gaps) < 0.7  # length alone decides


def test_unknown_lengths_leave_the_length_controlled_rate_out():
    assert summarize([Outcome(1.0, None, None), Outcome(0.0, None, None)])["length_controlled_win_rate"] is None


def test_few_prompts_are_no_evidence_however_narrow_the_interval():
    assert remarks(summarize([outcome(1.0)] * 4))[0].startswith("No difference is shown: the sign test")
    assert remarks(summarize([outcome(1.0)] * 8))[0].startswith("The judge prefers A")
