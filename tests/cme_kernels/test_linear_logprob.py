"""One set of tests for every implementation. Errors are judged by the float64 oracle: a forward statistic may be
off twice as much as eager float32 on the same inputs, a gradient twice as much as eager in the inputs' dtype."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear_problem import (
    OPTIONS,
    H,
    N,
    Problem,
    V,
    check_forward,
    check_gradients,
    error,
    gradients,
    make,
)
from torch import Tensor

from cme_kernels import IGNORE_INDEX, TokenStats, checks, linear_logprob, tiled, triton_configs
from cme_kernels.stats import OPTIONAL_STATS


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles, spans, merges and chunks at the sizes of these tests."""
    monkeypatch.setattr(tiled, "ROWS", 16)
    monkeypatch.setattr(tiled, "COLUMNS", 96)
    monkeypatch.setattr(triton_configs, "BACKWARD_WORKSPACE", N * 2 * 256)
    if "triton" in sys.modules or triton_available():
        from cme_kernels import triton_forward

        monkeypatch.setattr(triton_forward, "span_tiles", lambda vocab_size, columns: 2)
        monkeypatch.setattr(triton_forward, "MERGE_SPANS", 2)


def triton_available() -> bool:
    from cme_kernels.custom_op import triton_available

    return triton_available()


@pytest.mark.parametrize("options", OPTIONS)
def test_statistics(implementation: str, dtype: torch.dtype, device: torch.device, options: str) -> None:
    check_forward(make(dtype, device, options), implementation)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients(fused: str, dtype: torch.dtype, device: torch.device, options: str) -> None:
    upstream: list[Tensor | None] = [torch.randn(N, device=device), torch.randn(N, device=device)]
    check_gradients(make(dtype, device, options), fused, upstream)


@pytest.mark.parametrize("through", ["logprob", "entropy"])
def test_gradients_of_one_output(fused: str, device: torch.device, through: str) -> None:
    problem = make(torch.float32, device, "everything")
    grad = torch.randn(N, device=device)
    check_gradients(problem, fused, [grad, None] if through == "logprob" else [None, grad])


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_bias_of_another_dtype(fused: str, device: torch.device, bias_dtype: torch.dtype) -> None:
    problem = make(torch.float16, device, bias=True)
    assert problem.bias is not None
    problem = replace(problem, bias=problem.bias.to(bias_dtype))
    check_forward(problem, fused)
    copy = problem.detached()
    copy.run(fused).logprob.sum().backward()
    assert copy.bias is not None
    assert copy.bias.grad is not None
    assert copy.bias.grad.dtype == bias_dtype


def test_bias_with_gaps(fused: str, device: torch.device) -> None:
    problem = make(torch.float32, device, bias=True)
    assert problem.bias is not None
    problem.bias = torch.stack([problem.bias, problem.bias + 9], dim=1)[:, 0]
    check_forward(problem, fused)
    check_gradients(problem, fused, [torch.randn(N, device=device), torch.randn(N, device=device)])


@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 300), st.sampled_from(list(OPTIONS)))
@settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_shape(fused: str, n: int, h: int, v: int, options: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    problem = make(torch.float32, device, options, n, h, v)
    # Eager can be exact by luck where there are few rows, and log p = z - lse carries the last digit of lse
    check_forward(problem, fused, floor=5e-6)
    upstream: list[Tensor | None] = [torch.randn(n, device=device), torch.randn(n, device=device)]
    check_gradients(problem, fused, upstream, floor=2e-5)


@pytest.mark.parametrize("edge", ["first", "last"])
def test_targets_at_the_edges_of_tiles(fused: str, device: torch.device, edge: str) -> None:
    """Each target is alone in its tile of the vocabulary, so that no other row helps to find it."""
    width = tiled.COLUMNS if fused == "tiled" else triton_configs.tiles(device, torch.float32).forward.columns
    targets = torch.arange(0 if edge == "first" else width - 1, V, width, device=device)
    problem = replace(make(torch.float32, device, n=len(targets)), targets=targets)
    check_forward(problem, fused)
    check_gradients(problem, fused, [torch.randn(len(targets), device=device), None])


def test_the_gradient_of_hidden_is_rounded_once(
    fused: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tile but the first adds less than half a unit in the last place of a float16 sum, and all of them 2."""
    monkeypatch.setattr(triton_configs, "BACKWARD_WORKSPACE", 1)
    hidden = torch.zeros(1, 16, dtype=torch.float16, device=device, requires_grad=True)
    weight = torch.full((1024, 16), 4.0, dtype=torch.float16, device=device)
    weight[0] = 4096
    problem = Problem(hidden, weight.requires_grad_(), torch.zeros(1, dtype=torch.int64, device=device))
    problem.run(fused).logprob.backward()
    exact = 4092 * 1023 / 1024  # w_t - mean(w), as every p is 1 / 1024
    assert hidden.grad is not None
    assert error(hidden.grad, torch.full_like(hidden, exact, dtype=torch.float64)) <= 1


def test_float64(device: torch.device) -> None:
    problem = make(torch.float64, device, "everything")
    exact, actual = problem.eager(torch.float64), problem.run("tiled")
    for name in TokenStats.names():
        torch.testing.assert_close(getattr(actual, name), getattr(exact, name), rtol=1e-12, atol=1e-12)
    hidden, weight = problem.hidden[:6].requires_grad_(), problem.weight[:30].requires_grad_()
    targets = problem.targets[:6].clamp(max=29)

    def outputs(hidden: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
        stats = linear_logprob(hidden, weight, targets, softcap=3.0, stats=["entropy"], implementation="tiled")
        return stats.logprob, stats.entropy

    assert torch.autograd.gradcheck(outputs, (hidden, weight))


def test_a_real_vocabulary(
    fused: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen's 151,936 tokens, logits of spread 20, the tiles that ship. Triton's interpreter, which would take
    minutes, gets fewer tokens."""
    monkeypatch.undo()
    interpreted = fused == "triton" and device.type == "cpu"
    problem = make(dtype, device, n=12, h=64, v=1_936 if interpreted else 151_936, spread=20.0)
    check_forward(problem, fused)
    check_gradients(problem, fused, [torch.randn(12, device=device), torch.randn(12, device=device)])


@pytest.mark.parametrize("offset", [-3000.0, 3000.0])
def test_large_logits(fused: str, device: torch.device, offset: float) -> None:
    """Far from 0 a column that counts as 0, a maximum that starts at 0 and an unshifted entropy all show up.

    Small integers have exact products, so float32 logits carry no error of their own."""
    hidden = torch.randint(-2, 3, (9, 12)).float().to(device)
    weight = torch.randint(-2, 3, (V, 12)).float().to(device)
    problem = Problem(
        hidden, weight, torch.randint(V, (9,), device=device), torch.full((V,), offset, device=device)
    )
    check_forward(problem, fused)
    upstream: list[Tensor | None] = [torch.randn(9, device=device), torch.randn(9, device=device)]
    copies = [problem.detached() for _ in range(2)]
    exact = gradients(copies[0], copies[0].eager(torch.float64), upstream)
    actual = gradients(copies[1], copies[1].run(fused), upstream)
    for value, truth in zip(actual, exact, strict=True):
        # The backward starts from lse, whose last digit is 2e-4 here
        assert error(value, truth.double()) <= 5e-4 * truth.abs().max().item()


def test_forbidden_tokens(fused: str, device: torch.device) -> None:
    """A bias of -inf takes tokens out of the vocabulary, whole tiles and spans of it too."""
    problem = make(torch.float32, device, bias=True)
    assert problem.bias is not None
    problem.bias[:300] = -torch.inf
    problem.bias[650:] = -torch.inf
    problem.targets.clamp_(min=300, max=649)
    problem.targets[0] = 10
    actual, exact = problem.run(fused), problem.eager(torch.float64)
    assert actual.logprob[0] == -torch.inf
    assert torch.equal(actual.argmax, exact.argmax)
    torch.testing.assert_close(actual.logprob.double(), exact.logprob, rtol=1e-5, atol=1e-5)
    allowed = replace(
        problem, weight=problem.weight[300:650], bias=problem.bias[300:650], targets=problem.targets - 300
    )
    allowed.targets[0] = IGNORE_INDEX
    torch.testing.assert_close(
        actual.entropy[1:].double(), allowed.eager(torch.float64).entropy[1:], atol=1e-5, rtol=0
    )
    copy = problem.detached()
    stats = copy.run(fused)
    (stats.logprob[1:].sum() + stats.entropy.sum()).backward()
    assert copy.hidden.grad.isfinite().all()
    assert (copy.weight.grad[:300] == 0).all()


@pytest.mark.parametrize("place", ["hidden", "weight"])
def test_nan_stays_nan(implementation: str, device: torch.device, place: str) -> None:
    problem = make(torch.float32, device, "softcap")
    problem.targets[:] = 3
    (problem.hidden if place == "hidden" else problem.weight)[5, 7] = torch.nan
    wrong = (
        torch.arange(N, device=device) == 5
        if place == "hidden"
        else torch.ones(N, dtype=torch.bool, device=device)
    )
    copy = problem.detached()
    stats = copy.run(implementation)
    for name in ("logprob", "entropy", "lse", "max_logprob", "log_sum_sq_probs"):
        assert torch.equal(getattr(stats, name).isnan(), wrong), name
    (stats.logprob.sum() + stats.entropy.sum()).backward()
    assert copy.hidden.grad[5].isnan().all()


def test_ties_go_to_the_lowest_id(implementation: str, device: torch.device) -> None:
    problem = make(torch.float32, device)
    # In one tile, in the next tile of a span, in other spans
    problem.weight[[650, 300, 200, 100, 41, 40]] = problem.hidden[0] * 100
    problem.targets[:] = 1
    argmax = problem.run(implementation).argmax
    assert argmax is not None
    assert argmax[0] == 40


def test_no_rows(implementation: str, device: torch.device) -> None:
    problem = make(torch.float32, device, n=0, bias=True).detached()
    stats = problem.run(implementation)
    for name in TokenStats.names():
        assert getattr(stats, name).shape == (0,)
    assert stats.argmax is not None
    assert stats.argmax.dtype == torch.int64
    (stats.logprob.sum() + stats.entropy.sum()).backward()
    for leaf in problem.leaves():
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()


def test_one_row(fused: str, device: torch.device) -> None:
    problem = make(torch.float32, device, "everything", n=1)
    check_forward(problem, fused)
    check_gradients(problem, fused, [torch.randn(1, device=device), torch.randn(1, device=device)])


def test_one_token_vocabulary(fused: str, device: torch.device) -> None:
    stats = make(torch.float32, device, v=1).run(fused)
    assert (stats.logprob == 0).all()
    assert (stats.entropy == 0).all()


def test_all_rows_masked(implementation: str, device: torch.device) -> None:
    problem = make(torch.float32, device, "everything").detached()
    problem.targets[:] = IGNORE_INDEX
    stats = problem.run(implementation)
    for name in TokenStats.names():
        assert (getattr(stats, name) == (-1 if name == "argmax" else 0)).all()
    (stats.logprob.sum() + stats.entropy.sum()).backward()
    for leaf in problem.leaves():
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()


def spy(monkeypatch: pytest.MonkeyPatch, fused: str) -> list[tuple[Any, ...]]:
    """The arguments of each call of the backward."""
    if fused == "triton":
        from cme_kernels import triton_backward as module
    else:
        module = tiled  # type: ignore[assignment]
    calls: list[tuple[Any, ...]] = []
    backward = module.backward

    def recorded(*arguments: Any) -> Any:
        calls.append(arguments)
        return backward(*arguments)

    monkeypatch.setattr(module, "backward", recorded)
    return calls


def test_rows_without_gradient_are_dropped(
    fused: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = spy(monkeypatch, fused)
    problem = make(torch.float32, device, "everything")
    grad_logprob, grad_entropy = torch.randn(N, device=device), torch.zeros(N, device=device)
    grad_logprob[:30] = 0
    grad_entropy[3] = 0.5
    check_gradients(problem, fused, [grad_logprob, grad_entropy])
    live = (problem.targets[30:] != IGNORE_INDEX).sum() + (problem.targets[3] != IGNORE_INDEX)
    assert len(calls[0][2]) == live


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_only_needed_gradients(
    fused: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, trained: str
) -> None:
    calls = spy(monkeypatch, fused)
    problem = make(torch.float32, device, "everything")
    every = problem.detached()
    every.run(fused).logprob.sum().backward()
    some = problem.detached()
    for name in ("hidden", "weight", "bias"):
        getattr(some, name).requires_grad_(name == trained)
    some.run(fused).logprob.sum().backward()
    if (fused, trained) == ("tiled", "hidden"):
        assert len(calls) == 1  # its forward knew the gradient
    else:
        assert calls[1][-1] == tuple(name == trained for name in ("hidden", "weight", "bias"))
    for name in ("hidden", "weight", "bias"):
        grad = getattr(some, name).grad
        assert (grad is not None) == (name == trained)
        if grad is not None:
            torch.testing.assert_close(grad, getattr(every, name).grad)


@pytest.mark.parametrize("through", ["logprob", "entropy", "both"])
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_frozen_head(fused: str, dtype: torch.dtype, device: torch.device, options: str, through: str) -> None:
    problem = make(dtype, device, options)
    logprob, entropy = torch.randn(N, device=device), torch.randn(N, device=device)
    logprob[5], entropy[5] = 0, 0
    upstream = {"logprob": [logprob, None], "entropy": [None, entropy], "both": [logprob, entropy]}[through]
    copies = [problem.detached() for _ in range(3)]
    for copy in copies:
        for leaf in copy.leaves()[1:]:
            leaf.requires_grad_(False)
    exact, eager, actual = (
        gradients(copy, stats, upstream)
        for copy, stats in zip(
            copies, (copies[0].eager(torch.float64), copies[1].eager(dtype), copies[2].run(fused)), strict=True
        )
    )
    assert len(actual) == 1
    assert (actual[0][5] == 0).all()
    floor = 1e-6 * (1 + exact[0].abs().max().item())
    assert error(actual[0], exact[0].double()) <= 2 * error(eager[0], exact[0].double()) + floor


def test_frozen_head_with_nan_in_a_row_without_gradient(fused: str, device: torch.device) -> None:
    problem = make(torch.float32, device).detached()
    problem.weight.requires_grad_(False)
    with torch.no_grad():
        problem.hidden[5, 7] = torch.nan
    logprob = problem.run(fused).logprob
    grad = torch.ones_like(logprob)
    grad[5] = 0
    logprob.backward(grad)
    assert problem.hidden.grad is not None
    assert problem.hidden.grad.isfinite().all()


def test_nothing_asked_nothing_given(implementation: str, device: torch.device) -> None:
    problem = make(torch.float32, device)
    stats = problem.run(implementation, ())
    assert all(getattr(stats, name) is None for name in OPTIONAL_STATS)
    torch.testing.assert_close(stats.logprob, problem.run(implementation).logprob)
    for name in OPTIONAL_STATS:
        alone = getattr(problem.run(implementation, (name,)), name)
        torch.testing.assert_close(alone, getattr(problem.run(implementation), name))


@pytest.mark.skipif(not triton_available(), reason="no Triton")
def test_descriptors_and_pointers_load_the_same(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from cme_kernels import triton_backward, triton_forward

    used: list[bool] = []
    for module in (triton_forward, triton_backward):
        original = module.operand
        monkeypatch.setattr(
            module, "operand", lambda *a, operand=original: used.append(a[-1]) or operand(*a)  # type: ignore[func-returns-value]
        )  # fmt: skip
    results = []
    for offset in (0, 1):  # the second time, rows start 2 bytes late
        torch.manual_seed(0)
        problem = make(torch.float16, device, "everything").detached()
        with torch.no_grad():
            shifted = [torch.empty(x.numel() + 8, dtype=x.dtype, device=device) for x in problem.leaves()[:2]]
            problem.hidden, problem.weight = (
                s[offset : offset + x.numel()].view_as(x).copy_(x).requires_grad_()
                for s, x in zip(shifted, problem.leaves(), strict=False)
            )
        stats = problem.run("triton")
        assert stats.entropy is not None
        (stats.logprob.sum() + stats.entropy.sum()).backward()
        results.append([stats.logprob, stats.entropy, problem.hidden.grad, problem.weight.grad])
        assert (
            all(used) if offset == 0 and triton_configs.tiles(device, torch.float16).forward.tma else not any(used)
        )
        used.clear()
    for aligned, late in zip(*results, strict=True):
        assert aligned is not None
        assert torch.equal(aligned, late)


@pytest.mark.skipif(not triton_available(), reason="no Triton")
def test_what_descriptors_cannot_address() -> None:
    from cme_kernels.triton_forward import fits_tma

    x = torch.zeros(4, 16, dtype=torch.float16)
    assert fits_tma(x)
    assert fits_tma(x[1:, :8])
    assert not fits_tma(x[:, 1:9])
    assert not fits_tma(torch.zeros(4, 15, dtype=torch.float16))
    assert not fits_tma(x[:1].expand(4, 16))


@pytest.mark.parametrize("columns", [128, 256])
def test_spans_are_few_enough_for_the_workspace(columns: int) -> None:
    for vocab_size in (*range(1, 3000, 7), 32_000, 65_535, 128_256, 151_936, 262_208, 1_000_003):
        spans = -(-vocab_size // (triton_configs.span_tiles(vocab_size, columns) * columns))
        assert spans <= 256
        assert spans >= min(128, vocab_size // columns)


@pytest.mark.skipif(not triton_available(), reason="no Triton")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_row_does_not_depend_on_its_batch(device: torch.device, dtype: torch.dtype) -> None:
    problem = make(dtype, device, "everything", n=70)
    problem.targets.clamp_(min=0)
    # Sums of products of multiples of 1/32 are exact: a library under the interpreter may round by a row's place
    for tensor in problem.leaves():
        tensor.mul_(32).round_().div_(32)
    batch = problem.run("triton")
    temperature = problem.options["temperature"]
    for row in (slice(0, 1), slice(33, 34), slice(69, 70), slice(1, 49)):
        options = {**problem.options, "temperature": temperature[row]}
        alone = replace(problem, hidden=problem.hidden[row], targets=problem.targets[row], options=options)
        stats = alone.run("triton")
        for name in TokenStats.names():
            assert torch.equal(getattr(stats, name), getattr(batch, name)[row]), (row, name)


@pytest.mark.parametrize("wide", ["hidden", "weight"])
def test_offsets_beyond_32_bits(
    fused: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, wide: str
) -> None:
    """Rows 2^30 elements apart, over memory that is reserved and never touched."""
    if device.type == "cpu":
        # The interpreter writes each argument back onto itself, which would touch all of it
        monkeypatch.setattr(torch.UntypedStorage, "copy_", lambda self, *_: self)
    problem = make(torch.float16, device, n=3, v=4, h=8)
    narrow = getattr(problem, wide)
    try:
        reserved = torch.empty(3 * 2**30 + 64, dtype=torch.float16, device=device)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    rows = reserved.as_strided(narrow.shape, (2**30, 1))
    rows.copy_(narrow)
    apart = replace(problem, **{wide: rows})
    torch.testing.assert_close(apart.run(fused).logprob, problem.run(fused).logprob)
    leaf = getattr(apart, wide).requires_grad_()
    other = problem.detached()
    apart.run(fused).logprob.sum().backward()
    other.run(fused).logprob.sum().backward()
    torch.testing.assert_close(leaf.grad, getattr(other, wide).grad)


def test_strided_inputs(fused: str, device: torch.device) -> None:
    problem = make(torch.float32, device, "row temperature", n=40)
    expected = problem.run(fused)
    strided = replace(
        problem,
        hidden=problem.hidden.T.contiguous().T,
        weight=torch.cat([problem.weight, problem.weight], 1)[:, :H],
        targets=problem.targets.repeat_interleave(2)[::2],
        options={"temperature": problem.options["temperature"].repeat_interleave(2)[::2]},
    )
    torch.testing.assert_close(strided.run(fused).logprob, expected.logprob)
    upstream: list[Tensor | None] = [torch.randn(40, device=device), None]
    copies = strided.detached(), problem.detached()
    grads = [gradients(copy, copy.run(fused), upstream) for copy in copies]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_zero_dimensional_temperature(implementation: str, device: torch.device) -> None:
    problem = make(torch.float32, device)
    number, tensor = (replace(problem, options={"temperature": t}) for t in (0.7, torch.tensor(0.7)))
    torch.testing.assert_close(tensor.run(implementation).logprob, number.run(implementation).logprob)


def test_temperature_of_another_dtype(fused: str, device: torch.device) -> None:
    problem = make(torch.float16, device)
    a, b = (
        replace(problem, options={"temperature": torch.full((N,), 2, dtype=d, device=device)})
        for d in (torch.int64, torch.float64)
    )
    assert torch.equal(a.run(fused).logprob, b.run(fused).logprob)


def test_target_outside_the_vocabulary(implementation: str, device: torch.device) -> None:
    problem = make(torch.float32, device)
    problem.targets[7] = V
    if device.type == "cpu":
        with pytest.raises(
            IndexError, match=rf"targets\[7\] = {V} is outside the vocabulary \[0, {V}\); use -100"
        ):
            problem.run(implementation)
        problem.targets[7] = -1
        with pytest.raises(IndexError, match=r"targets\[7\] = -1 is outside"):
            problem.run(implementation)
    else:
        problem.targets[8] = -1
        assert problem.run(implementation).logprob.isnan().nonzero().squeeze(1).tolist() == [7, 8]


def test_target_outside_the_vocabulary_is_nan_without_a_check(
    fused: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does, on any device."""
    monkeypatch.setattr(checks, "check_values", lambda *_: None)
    problem = make(torch.float32, device).detached()
    problem.targets[7], problem.targets[8] = V + 3, -1
    stats = problem.run(fused)
    assert stats.logprob.isnan().nonzero().squeeze(1).tolist() == [7, 8]
    assert stats.entropy is not None
    assert stats.entropy.isfinite().all()
    stats.logprob.sum().backward()
    assert problem.hidden.grad is not None
    assert problem.hidden.grad.isnan().any(1).nonzero().squeeze(1).tolist() == [7, 8]
    masked = problem.detached()
    grad = torch.ones(N, device=device)
    grad[[7, 8]] = 0
    masked.run(fused).logprob.backward(grad)
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in masked.leaves())


def test_autocast(fused: str, device: torch.device) -> None:
    dtype = torch.bfloat16 if fused == "tiled" or device.type == "cuda" else torch.float16
    problem = make(torch.float32, device, "everything").detached()
    rounded = replace(problem, hidden=problem.hidden.to(dtype), weight=problem.weight.to(dtype))
    with torch.autocast(device.type, dtype):
        stats = problem.run(fused)
    assert torch.equal(stats.logprob, rounded.run(fused).logprob)
    stats.logprob.sum().backward()
    for leaf in problem.leaves():
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32


def test_autocast_rounds_the_inputs_only(device: torch.device) -> None:
    problem = make(torch.bfloat16, device, "everything").detached()
    problem.weight.requires_grad_(False)
    assert problem.bias is not None
    problem.bias.requires_grad_(False)
    results = []
    for enabled in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            stats = problem.run("tiled")
        (grad,) = torch.autograd.grad(stats.logprob.sum(), problem.hidden)
        results.append([*(getattr(stats, name) for name in TokenStats.names()), grad])
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


def test_autocast_leaves_float64(device: torch.device) -> None:
    problem = make(torch.float64, device)
    with torch.autocast(device.type, torch.bfloat16):
        assert problem.run("tiled").logprob.dtype == torch.float64


@pytest.mark.parametrize("head", ["trained", "frozen"])
def test_second_derivatives_are_refused(fused: str, device: torch.device, head: str) -> None:
    problem = make(torch.float32, device).detached()
    problem.weight.requires_grad_(head == "trained")
    (grad,) = torch.autograd.grad(problem.run(fused).logprob.exp().sum(), problem.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "hidden shape": ({"hidden": torch.zeros(3)}, r"expected hidden \[N, H\]"),
    "width": ({"hidden": torch.zeros(3, 5)}, r"expected hidden .* \(3, 5\) and \(7, 4\)"),
    "empty vocabulary": ({"weight": torch.zeros(0, 4)}, "the vocabulary is empty"),
    "targets dtype": ({"targets": torch.zeros(3, dtype=torch.int32)}, r"int64 of shape \[3\], got torch.int32"),
    "targets shape": ({"targets": torch.zeros(2, dtype=torch.int64)}, r"int64 of shape \[3\]"),
    "bias shape": (
        {"bias": torch.zeros(4)},
        r"bias must be floating-point of shape \[7\], got torch.float32 \(4,\)",
    ),
    "bias dtype": ({"bias": torch.zeros(7, dtype=torch.int64)}, "bias must be floating-point"),
    "dtypes": ({"weight": torch.zeros(7, 4).bfloat16()}, "hidden is torch.float32 but weight is torch.bfloat16"),
    "integers": (
        {"hidden": torch.zeros(3, 4, dtype=torch.int64), "weight": torch.zeros(7, 4, dtype=torch.int64)},
        "hidden must be a floating-point tensor",
    ),
    "device": ({"weight": torch.zeros(7, 4, device="meta")}, "hidden is on cpu but weight on meta"),
    "softcap": ({"softcap": 0.0}, "softcap must be positive and finite, got 0.0"),
    "nan softcap": ({"softcap": float("nan")}, "softcap must be positive"),
    "logit_scale": ({"logit_scale": float("inf")}, "logit_scale must be finite"),
    "temperature": ({"temperature": -1.0}, "temperature must be positive and finite, got -1.0"),
    "infinite temperature": ({"temperature": float("inf")}, "temperature must be positive and finite, got inf"),
    "temperature shape": ({"temperature": torch.ones(2)}, r"temperature must be a number or have shape \[3\]"),
    "row temperature": ({"temperature": torch.tensor([1.0, 0.0, 1.0])}, r"got temperature\[1\] = 0.0"),
    "infinite row temperature": ({"temperature": torch.tensor([1.0, 1.0, torch.inf])}, r"temperature\[2\] = inf"),
    "temperature grad": ({"temperature": torch.ones(3).requires_grad_()}, "temperature requires a gradient"),
    "stats": ({"stats": ("entropy", "median")}, r"unknown stats \['median'\]; choose from entropy"),
    "implementation": ({"implementation": "magic"}, "implementation='magic' is not one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    changes, message = BAD[case]
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "targets": torch.zeros(3).long()}
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{**arguments, **changes})


@pytest.mark.skipif(not triton_available(), reason="no Triton")
def test_triton_refuses_what_it_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="no float64"):
        make(torch.float64, cpu).run("triton")
    with pytest.raises(
        ValueError, match="multiplies bfloat16 wrongly" if not torch.cuda.is_available() else "GPU"
    ):
        make(torch.bfloat16, cpu).run("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a GPU"):
        make(torch.float32, cpu).run("triton")


def test_importing_the_kernels_imports_no_model_library() -> None:
    program = (
        "import sys, cme_kernels; print([m for m in ('transformers', 'trl', 'cme', 'triton') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


SHARDED = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor
from cme_kernels import linear_logprob

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
hidden, weight, bias, targets = torch.randn(6, 4), torch.randn(11, 4), torch.randn(11), torch.randint(11, (6,))
for tensor in (hidden, weight, bias, targets):
    dist.broadcast(tensor, 0)
mesh, mine = DeviceMesh("cpu", [0, 1]), slice(3 * rank, 3 * rank + 3)
shards = [torch.nn.Parameter(distribute_tensor(x, mesh, [Shard(0)])) for x in (weight, bias)]
whole = [x.clone().requires_grad_() for x in (weight, bias)]
linear_logprob(hidden[mine], shards[0], targets[mine], bias=shards[1]).logprob.sum().backward()
linear_logprob(hidden, whole[0], targets, bias=whole[1]).logprob.sum().backward()
for shard, x in zip(shards, whole):
    torch.testing.assert_close(shard.grad.full_tensor(), x.grad / 2)
"""


def test_sharded_weight(tmp_path: Path) -> None:
    """Two ranks with rows of their own: the gradient of the shards is the mean over the ranks."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", SHARDED, str(rank), str(tmp_path / "store")], env=environment)
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
