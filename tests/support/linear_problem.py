"""Random inputs of `linear_logprob`, and the float64 oracle that judges an implementation on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cme_kernels import IGNORE_INDEX, TokenStats, linear_logprob, reference
from cme_kernels.stats import OPTIONAL_STATS, LogitTransform

N, H, V = 37, 40, 700  # of no block a multiple


@dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def detached(self) -> Problem:
        """A copy whose tensors are fresh leaves with gradients."""
        hidden, weight = (x.detach().clone().requires_grad_() for x in (self.hidden, self.weight))
        bias = None if self.bias is None else self.bias.detach().clone().requires_grad_()
        return replace(self, hidden=hidden, weight=weight, bias=bias)

    def run(self, implementation: str, stats: tuple[str, ...] = OPTIONAL_STATS) -> TokenStats:
        return linear_logprob(
            self.hidden,
            self.weight,
            self.targets,
            bias=self.bias,
            stats=stats,
            implementation=implementation,  # type: ignore[arg-type]
            **self.options,
        )

    def eager(self, dtype: torch.dtype) -> TokenStats:
        """The plain computation, every operation in `dtype`."""
        options = {"softcap": None, "logit_scale": 1.0, "temperature": 1.0, **self.options}
        transform = LogitTransform(**options)
        return reference.token_stats(
            self.hidden, self.weight, self.targets, self.bias, transform, OPTIONAL_STATS, dtype
        )


OPTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "plain": lambda n: {},
    "softcap": lambda n: {"softcap": 6.0},
    "wide softcap": lambda n: {"softcap": 30.0},
    "logit_scale": lambda n: {"logit_scale": 0.3},
    "temperature": lambda n: {"temperature": 0.7},
    "row temperature": lambda n: {"temperature": torch.rand(n) * 1.5 + 0.3},
    "everything": lambda n: {"softcap": 5.0, "logit_scale": 1.7, "temperature": torch.rand(n) * 1.5 + 0.3},
}


def make(
    dtype: torch.dtype,
    device: torch.device,
    options: str = "plain",
    n: int = N,
    h: int = H,
    v: int = V,
    *,
    bias: bool | None = None,
    spread: float = 3.0,
) -> Problem:
    """Random logits with standard deviation `spread`, a fifth of the rows masked; a bias with "everything"."""
    hidden = torch.randn(n, h)
    weight = torch.randn(v, h) * (spread / h**0.5)
    targets = torch.randint(v, (n,))
    targets[2::5] = IGNORE_INDEX
    bias = options == "everything" if bias is None else bias
    settings = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in OPTIONS[options](n).items()}
    return Problem(
        hidden.to(device, dtype),
        weight.to(device, dtype),
        targets.to(device),
        torch.randn(v).to(device, dtype) if bias else None,
        settings,
    )


def error(actual: Tensor, exact: Tensor) -> float:
    assert actual.shape == exact.shape
    return (actual.double() - exact).abs().max().item() if actual.numel() else 0.0


def check_forward(problem: Problem, implementation: str, floor: float = 1e-6) -> None:
    exact, eager = problem.eager(torch.float64), problem.eager(torch.float32)
    actual = problem.run(implementation)
    assert actual.argmax is not None
    assert actual.argmax.dtype == torch.int64
    for name in ("logprob", "entropy", "lse", "max_logprob", "log_sum_sq_probs"):
        value, truth = getattr(actual, name), getattr(exact, name)
        assert value.dtype == (torch.float32 if implementation != "reference" else torch.float64)
        assert not value.isnan().any(), name
        assert error(value, truth) <= 2 * error(getattr(eager, name), truth) + floor, name
    ignored = problem.targets == IGNORE_INDEX
    assert torch.equal(actual.argmax == -1, ignored)
    gap = gap_to_top(problem).gather(1, actual.argmax.clamp(min=0).unsqueeze(1))
    assert (gap[~ignored] <= 1e-3).all()


def gap_to_top(problem: Problem) -> Tensor:
    """Distance of each projection from the largest of its row, [N, V]: among equals any argmax is right."""
    x = problem.hidden.double() @ problem.weight.double().T
    if problem.bias is not None:
        x = x + problem.bias.double()
    return x.amax(1, keepdim=True) - x


def gradients(problem: Problem, stats: TokenStats, upstream: list[Tensor | None]) -> list[Tensor]:
    loss = torch.zeros((), dtype=torch.float64, device=problem.hidden.device)
    for value, grad in zip((stats.logprob, stats.entropy), upstream, strict=True):
        if grad is not None:
            assert value is not None
            loss = loss + (value.double() * grad).sum()
    loss.backward()
    return [leaf.grad for leaf in problem.leaves() if leaf.grad is not None]


def check_gradients(
    problem: Problem, implementation: str, upstream: list[Tensor | None], floor: float = 1e-6
) -> None:
    copies = [problem.detached() for _ in range(3)]
    exact = gradients(copies[0], copies[0].eager(torch.float64), upstream)
    eager = gradients(copies[1], copies[1].eager(problem.hidden.dtype), upstream)
    actual = gradients(copies[2], copies[2].run(implementation), upstream)
    assert len(actual) == len(problem.leaves())
    for leaf, value, plain, truth in zip(problem.leaves(), actual, eager, exact, strict=True):
        assert value.dtype == leaf.dtype
        # Sums of terms of order 1 can cancel, so float32 has an absolute error of that order times 1e-7
        tolerance = floor * (1 + truth.abs().max().item())
        assert error(value, truth.double()) <= 2 * error(plain, truth.double()) + tolerance
