"""Several verifiers as one."""

import pytest
import torch

from cme.scores import ResponseScore, combine
from cme_kernels import TokenStats


def score(*logprobs, num_bytes=4):
    if not logprobs:
        return ResponseScore(None, (), 0, "the response is empty")
    return ResponseScore(TokenStats(torch.tensor(logprobs)), tuple(range(len(logprobs))), num_bytes)


SCORES = [
    [score(-1.0, -3.0), score(-4.0), score(-1.0)],
    [score(-1.0), score(-2.0, -1.0), score()],
]


def test_the_mean_and_the_extremes_of_each_response():
    assert combine(SCORES) == [-1.5, -2.75, None]
    assert combine(SCORES, "min") == [-2.0, -4.0, None]
    assert combine(SCORES, how="max", signal="sum_logprob") == [-1.0, -3.0, None]
    assert combine(SCORES[:1], "min") == [-2.0, -4.0, -1.0]
    assert combine(SCORES, "max", "bits_per_byte")[0] == pytest.approx(4 / (4 * 0.6931472))
    assert combine([[], []]) == combine([]) == []


def test_verifiers_must_have_scored_the_same_responses():
    with pytest.raises(ValueError, match=r"have scored \[3, 2\] responses"):
        combine([SCORES[0], SCORES[1][:2]])
    with pytest.raises(ValueError, match="how='median' is none of 'mean', 'min', 'max'"):
        combine(SCORES, "median")
