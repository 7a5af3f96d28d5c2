"""linear_logprob against the bare matmul and against other ways to the same numbers.

    pytest benchmarks/test_linear_logprob.py -s

Contestants take turns, so that a busy machine or a changing clock hits all of them; ratios are medians over the
rounds, to the bare `hidden @ weight.T` of the same round. Beside them stand the memory that a call needs on top
of its inputs, and the error of its log-probabilities against float64. Sizes are those of a small model on a CPU,
and of real ones where there is a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.timing import CUDA, DEVICE, Result, race
from cme_kernels import linear_logprob

DTYPE = torch.bfloat16 if CUDA else torch.float32
ROUNDS = 10 if CUDA else 3
SHAPES = (
    {"Qwen2.5-7B": (8192, 3584, 152064), "Qwen3-0.6B": (8192, 1024, 151936)}
    if CUDA
    else {"SmolLM2-135M": (256, 576, 49152), "wide vocabulary": (256, 320, 131072)}
)
FORWARD_SHAPES = SHAPES if CUDA else {**SHAPES, "gemma-3-270m": (1024, 640, 262144)}
ORACLE_ROWS = 64

LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, targets).logprob


def ours_with_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, targets, stats=("entropy",)).logprob


def contestants() -> dict[str, LogProbs]:
    """What is installed here, by name."""
    found: dict[str, LogProbs] = {"eager": eager}
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ())[0]

        found["TRL chunked"] = chunked
    except ImportError:
        pass
    if hasattr(functional, "linear_cross_entropy"):
        options = getattr(functional, "LinearCrossEntropyOptions", None)

        def core(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            arguments = {} if options is None else {"options": options()}
            return -functional.linear_cross_entropy(hidden, weight, targets, reduction="none", **arguments)

        found["torch core"] = core
    return {**found, "cme": ours}


def inputs(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    n, h, v = shape
    torch.manual_seed(0)
    hidden = torch.randn(n, h, device=DEVICE).to(DTYPE)
    weight = (torch.randn(v, h, device=DEVICE) * (3 / h**0.5)).to(DTYPE)  # logits with a deviation of 3
    return hidden, weight, torch.randint(v, (n,), device=DEVICE)


def show(title: str, results: dict[str, Result], errors: dict[str, float], benchmark: Any) -> None:
    print(f"\n{title}, {torch.get_num_threads()} threads, {DEVICE.type}, {DTYPE}")
    print(f"{'':<16}{'ms':>10}{'x matmul':>10}{'extra MiB':>11}{'max error':>11}")
    for name, r in results.items():
        error = f"{errors[name]:.1e}" if name in errors else ""
        print(f"{name:<16}{r.milliseconds:>10.1f}{r.ratio:>10.2f}{r.extra_mib:>11.0f}{error:>11}")
        benchmark.extra_info[name] = {**vars(r), "max_error": errors.get(name)}


@pytest.mark.parametrize("shape", FORWARD_SHAPES.values(), ids=FORWARD_SHAPES)
def test_forward(benchmark: Any, shape: tuple[int, int, int]) -> None:
    hidden, weight, targets = inputs(shape)
    out = torch.empty(shape[0], shape[2], device=DEVICE, dtype=DTYPE)
    functions = {**contestants(), "cme + entropy": ours_with_entropy}
    rows = slice(ORACLE_ROWS)
    exact = eager(hidden[rows].double().cpu(), weight.double().cpu(), targets[rows].cpu())
    with torch.no_grad():
        plain = eager(hidden[rows].float(), weight.float(), targets[rows])
        errors = {name: max_error(f(hidden[rows], weight, targets[rows]), exact) for name, f in functions.items()}
        calls: dict[str, Callable[[], Any]] = {"matmul": lambda: torch.mm(hidden, weight.T, out=out)}
        for name, function in functions.items():
            calls[name] = partial(function, hidden, weight, targets)
        results = race(calls, "matmul", ROUNDS)
        benchmark.pedantic(ours, (hidden, weight, targets), rounds=ROUNDS)
    show(f"forward {shape}", results, errors, benchmark)
    assert errors["cme"] <= 2 * max_error(plain, exact) + 1e-6


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_backward(benchmark: Any, shape: tuple[int, int, int]) -> None:
    hidden, weight, targets = inputs(shape)
    out = torch.empty(shape[0], shape[2], device=DEVICE, dtype=DTYPE)
    upstream = torch.randn(shape[0], device=DEVICE)
    hidden.requires_grad_()
    weight.requires_grad_()

    def both(function: LogProbs) -> tuple[Tensor, ...]:
        logprob = function(hidden, weight, targets)
        return torch.autograd.grad(logprob, (hidden, weight), upstream.to(logprob.dtype))

    calls: dict[str, Callable[[], Any]] = {
        "matmul": lambda: torch.mm(hidden.detach(), weight.detach().T, out=out),
        **{name: partial(both, function) for name, function in contestants().items()},
    }
    results = race(calls, "matmul", ROUNDS)
    benchmark.pedantic(both, (ours,), rounds=ROUNDS)
    show(f"forward and backward {shape}", results, {}, benchmark)


def max_error(actual: Tensor, exact: Tensor) -> float:
    return (actual.double().cpu() - exact).abs().max().item()
