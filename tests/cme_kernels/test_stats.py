from __future__ import annotations

import itertools
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from cme_kernels.stats import (
    IGNORE_INDEX,
    OPTIONAL_STATS,
    LogitTransform,
    PartialStats,
    TokenStats,
    allocate,
    merge,
)


def partial(z: Tensor, targets: Tensor, start: int, stop: int) -> PartialStats:
    """By the definitions."""
    piece = z[:, start:stop]
    m = piece.amax(1)
    d = piece - m.unsqueeze(1)
    inside = (targets >= start) & (targets < stop)
    at_target = z.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    return PartialStats(
        max=m,
        sum_exp=d.exp().sum(1),
        target_logit=at_target.where(inside, -torch.inf),
        shifted=(d.exp() * d).sum(1),
        sum_sq=(2 * d).exp().sum(1),
        argmax=piece.argmax(1) + start,
    )


@pytest.mark.parametrize("offset", [0.0, -500.0, 500.0])
@pytest.mark.parametrize("cuts", [(0, 50), (0, 1, 50), (0, 17, 30, 49, 50)])
def test_merged_slices_are_the_whole(cuts: tuple[int, ...], offset: float) -> None:
    z = torch.randn(8, 50, dtype=torch.float64) * 5 + offset
    z[:, 10] = z[:, 40] = z.amax() + 1  # a tie across the cuts
    targets = torch.randint(50, (8,))
    targets[3] = IGNORE_INDEX
    merged = partial(z, targets, *cuts[:2])
    for start, stop in itertools.pairwise(cuts[1:]):
        merged = merge(merged, partial(z, targets, start, stop))
    stats = merged.finalize(targets, OPTIONAL_STATS, 50)

    log_p = z.log_softmax(1)
    valid = targets != IGNORE_INDEX
    expected = {
        "logprob": log_p.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1),
        "entropy": -(log_p.exp() * log_p).sum(1),
        "lse": z.logsumexp(1),
        "max_logprob": log_p.amax(1),
        "argmax": torch.full((8,), 10),
        "log_sum_sq_probs": (2 * log_p).logsumexp(1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(stats, name)[valid], value[valid], rtol=1e-12, atol=1e-12)
        assert getattr(stats, name)[3] == (-1 if name == "argmax" else 0)


def test_slices_without_any_probability() -> None:
    z = torch.full((2, 6), -torch.inf, dtype=torch.float64)
    z[:, 2] = 1.0
    targets = torch.tensor([2, 5])
    empty_first = merge(partial_of_forbidden(z, targets, 0, 2), partial_of_forbidden(z, targets, 2, 6))
    stats = empty_first.finalize(targets, OPTIONAL_STATS, 6)
    assert stats.logprob.tolist() == [0.0, -torch.inf]
    assert stats.entropy is not None
    assert stats.entropy.tolist() == [0.0, 0.0]
    assert stats.argmax is not None
    assert stats.argmax.tolist() == [2, 2]
    both = merge(partial_of_forbidden(z, targets, 0, 1), partial_of_forbidden(z, targets, 1, 2))
    assert both.sum_exp.tolist() == [0.0, 0.0]
    assert both.shifted is not None
    assert both.shifted.tolist() == [0.0, 0.0]


def partial_of_forbidden(z: Tensor, targets: Tensor, start: int, stop: int) -> PartialStats:
    from cme_kernels.tiled import _tile_stats

    piece = z[:, start:stop].clone()
    scratch, weight = torch.empty_like(piece).view(-1), piece.T.contiguous()
    return _tile_stats(piece, scratch, targets, slice(start, stop), OPTIONAL_STATS, weight, LogitTransform())


def test_finalize_far_from_zero_keeps_every_digit() -> None:
    """target - lse would leave the rounding error of lse, 2e-4 here."""
    z = torch.tensor([[3000.0, 3001.0, 2990.0]])
    stats = partial(z, torch.tensor([0]), 0, 3).finalize(torch.tensor([0]), ("entropy",), 3)
    exact = z.double().log_softmax(1)
    assert abs(stats.logprob.item() - exact[0, 0].item()) < 2e-7


def test_allocate_has_what_the_statistics_need() -> None:
    device = torch.device("cpu")
    none = allocate((3, 2), (), torch.float32, device)
    assert none.shifted is none.sum_sq is none.argmax is None
    every = allocate((3, 2), OPTIONAL_STATS, torch.float32, device)
    assert every.shifted is not None
    assert every.shifted.shape == every.max.shape == (3, 2)
    assert every.argmax is not None
    assert every.argmax.dtype == torch.int64


def test_names_are_in_the_order_of_the_fields() -> None:
    assert TokenStats.names() == tuple(field.name for field in fields(TokenStats))


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)], ids=str)
def test_transform_and_its_derivative(softcap: float | None, temperature: float | Tensor) -> None:
    transform = LogitTransform(softcap, 1.3, temperature)
    x = torch.randn(3, 5, dtype=torch.float64).mul_(3).requires_grad_()
    t = temperature.unsqueeze(1) if isinstance(temperature, Tensor) else temperature
    z = 1.3 * x / t if softcap is None else softcap * torch.tanh(1.3 * x / softcap) / t
    torch.testing.assert_close(transform.apply_(x.detach().clone()), z.detach())
    upstream = torch.randn(3, 5, dtype=torch.float64)
    z.backward(upstream)
    torch.testing.assert_close(upstream * transform.derivative(z.detach()), x.grad)
