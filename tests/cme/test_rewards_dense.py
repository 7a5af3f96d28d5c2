"""Values of one tokenizer's tokens on another's."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cme.rewards.dense import spread


def test_a_value_is_split_by_the_characters_in_common():
    # "Warsaw": War|saw onto W|arsaw
    assert spread([-3.0, -1.0], [(0, 3), (3, 6)], [(0, 1), (1, 6)]) == [-1.0, -3.0]
    assert spread([-3.0, -1.0], [(0, 3), (3, 6)], [(0, 3), (3, 6)]) == [-3.0, -1.0]


def test_what_overlaps_nothing_goes_to_the_nearest():
    assert spread([-1.0, -2.0], [(0, 0), (9, 9)], [(0, 4), (4, 8)]) == [-1.0, -2.0]
    with pytest.raises(ValueError, match="no tokens"):
        spread([-1.0], [(0, 1)], [])
    with pytest.raises(ValueError, match="2 values for 1 spans"):
        spread([-1.0, -2.0], [(0, 1)], [(0, 1)])
    assert spread([], [], []) == []


def spans(cuts):
    edges = [0, *sorted(cuts), 20]
    return list(pairwise(edges))


@given(
    st.lists(st.integers(0, 20), max_size=8),
    st.lists(st.integers(0, 20), max_size=8),
    st.randoms(use_true_random=False),
)
def test_the_total_is_conserved_and_no_value_crosses_the_text(mine, theirs, random):
    source, onto = spans(mine), spans(theirs)
    values = [-random.random() for _ in source]
    got = spread(values, source, onto)
    assert math.isclose(sum(got), sum(values), abs_tol=1e-9)
    # A token gets nothing from tokens that end before it, up to a common boundary
    for j, (start, end) in enumerate(onto):
        touching = [v for v, (a, b) in zip(values, source, strict=True) if a <= end and b >= start]
        assert got[j] >= sum(touching) - 1e-9
