"""`linear_logprob` as an operator of torch: its contract, and one graph through it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cme_kernels import linear_logprob
from cme_kernels.custom_op import linear_logprob_backward_op, linear_logprob_op
from cme_kernels.stats import OPTIONAL_STATS

N, H, V = 9, 16, 70


def inputs(device: torch.device, *, grad: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, bias = (torch.randn(*shape, device=device) for shape in ((N, H), (V, H), (V,)))
    targets = torch.randint(V, (N,), device=device)
    targets[2] = -100
    return (*(x.requires_grad_(grad) for x in (hidden, weight)), targets, bias.requires_grad_(grad))


@pytest.mark.parametrize("stats", [["lse"], [*OPTIONAL_STATS]], ids=["lse", "every"])
@pytest.mark.parametrize("temperature", ["one", "row"])
def test_the_operator_keeps_its_contract(
    fused: str, device: torch.device, stats: list[str], temperature: str
) -> None:
    hidden, weight, targets, bias = inputs(device)
    rows = None if temperature == "one" else torch.rand(N, device=device) + 0.5
    arguments = (stats, hidden, weight, targets, bias, rows, 0.7, 5.0, 1.5, fused, "")
    torch.library.opcheck(linear_logprob_op, arguments)


@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False], [False, True, False]], ids=str)
def test_the_backward_operator_keeps_its_contract(fused: str, device: torch.device, needs: list[bool]) -> None:
    hidden, weight, targets, bias = inputs(device, grad=False)
    exact = linear_logprob(hidden, weight, targets, bias=bias, stats=["lse", "entropy"])
    assert exact.lse is not None
    assert exact.entropy is not None
    grads = torch.randn(2, N, device=device).unbind()
    arguments = (
        *grads,
        exact.lse,
        exact.entropy,
        needs,
        hidden,
        weight,
        targets,
        bias,
        None,
        1.0,
        None,
        1.0,
        fused,
    )
    torch.library.opcheck(linear_logprob_backward_op, (*arguments, ""))


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_graph_through_it(fused: str, device: torch.device, dynamic: bool) -> None:
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor, temperature: Any) -> Tensor:
        stats = linear_logprob(
            hidden * 2,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            stats=["entropy"],
            implementation=fused,
        )
        assert stats.entropy is not None
        return (stats.logprob * stats.logprob.detach().exp() + 0.1 * stats.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for temperature in (0.8, torch.rand(N, device=device) + 0.5):
        *plain, targets, plain_bias = inputs(device)
        copies = [x.detach().clone().requires_grad_() for x in (*plain, plain_bias)]
        expected = loss(*plain, targets, plain_bias, temperature)
        actual = compiled(*copies[:2], targets, copies[2], temperature)
        torch.testing.assert_close(actual, expected)
        expected.backward()
        actual.backward()
        for x, y in zip((*plain, plain_bias), copies, strict=True):
            torch.testing.assert_close(y.grad, x.grad)


def test_one_graph_for_any_number_of_rows(device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda h, w, t: linear_logprob(h, w, t, implementation="tiled").logprob.sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    hidden, weight, targets, _ = inputs(device)
    for n in (N, 5, 7):
        rows, ids = hidden[:n].detach().clone().requires_grad_(), targets[:n].clone()
        torch._dynamo.mark_dynamic(rows, 0)
        torch._dynamo.mark_dynamic(ids, 0)
        compiled(rows, weight, ids).backward()
        (expected,) = torch.autograd.grad(linear_logprob(rows, weight, ids).logprob.sum(), rows)
        torch.testing.assert_close(rows.grad, expected)


def test_one_graph_through_the_log_probability_alone(fused: str, device: torch.device) -> None:
    """A compiled graph hands zeros to outputs that nobody used, here to one without elements."""
    hidden, weight, targets, _ = inputs(device)
    compiled = torch.compile(
        lambda h, w: linear_logprob(h, w, targets, implementation=fused).logprob.sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    compiled(hidden, weight).backward()
    expected = torch.autograd.grad(linear_logprob(hidden, weight, targets).logprob.sum(), (hidden, weight))
    torch.testing.assert_close((hidden.grad, weight.grad), expected)


def test_only_log_probability_and_entropy_carry_a_gradient(fused: str, device: torch.device) -> None:
    hidden, weight, targets, _ = inputs(device)
    stats = linear_logprob(hidden, weight, targets, stats=OPTIONAL_STATS, implementation=fused)
    carriers = {name for name in ("logprob", *OPTIONAL_STATS) if getattr(stats, name).requires_grad}
    assert carriers == {"logprob", "entropy"}
