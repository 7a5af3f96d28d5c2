"""Statistics per token, and the algebra that joins partial results over slices of the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Rows with this target get 0 in every statistic (-1 in `argmax`) and no gradient."""

OPTIONAL_STATS = ("entropy", "lse", "max_logprob", "argmax", "log_sum_sq_probs")


@dataclass(frozen=True)
class TokenStats:
    """Statistics of the next-token distribution `p`, one value per row: shape `[N]`, float32 (float64 for
    float64 inputs), natural units. Those that were not requested are None.

    Attributes:
        logprob: log p[target], in nats.
        entropy: -sum_v p_v log p_v, in nats.
        lse: log sum_v exp z_v of the final logits z.
        max_logprob: log p of the most likely token, in nats.
        argmax: id of the most likely token, the lowest one of equals. int64.
        log_sum_sq_probs: log sum_v p_v^2; its negative is the Renyi entropy of order 2.
    """

    logprob: Tensor
    entropy: Tensor | None = None
    lse: Tensor | None = None
    max_logprob: Tensor | None = None
    argmax: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None

    @staticmethod
    def names() -> tuple[str, ...]:
        return ("logprob", *OPTIONAL_STATS)


@dataclass(frozen=True)
class LogitTransform:
    """The function from the projection x = hidden @ weight.T + bias to final logits z:

    z = softcap * tanh(logit_scale * x / softcap) / temperature,   or   logit_scale * x / temperature.

    `temperature` is one number or a float32 tensor of shape [N].
    """

    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float | Tensor = 1.0

    def rows(self, index: Tensor | slice) -> LogitTransform:
        """The same transform for a selection of rows."""
        if isinstance(self.temperature, Tensor):
            return LogitTransform(self.softcap, self.logit_scale, self.temperature[index])
        return self

    def inverse_temperature(self) -> float | Tensor:
        """1/T, shaped to multiply a [N, V] tile."""
        if isinstance(self.temperature, Tensor):
            return self.temperature.reciprocal().unsqueeze(1)
        return 1.0 / self.temperature

    def apply_(self, x: Tensor) -> Tensor:
        """Turn a tile of projections [N, v] into final logits, in place."""
        if self.logit_scale != 1.0:
            x.mul_(self.logit_scale)
        if self.softcap is not None:
            x.div_(self.softcap).tanh_().mul_(self.softcap)
        if isinstance(self.temperature, Tensor) or self.temperature != 1.0:
            x.mul_(self.inverse_temperature())
        return x

    def derivative(self, z: Tensor) -> float | Tensor:
        """d z / d x at a tile of final logits z [N, v]: one number, or a tensor that broadcasts to the tile."""
        inverse_temperature = self.inverse_temperature()
        slope = self.logit_scale * inverse_temperature  # a / T, [N, 1] with one temperature per row
        if self.softcap is not None:
            # tanh(scale x / c) = z T / c, and d/dx c tanh(scale x / c) = scale (1 - tanh^2)
            tanh = z / (inverse_temperature * self.softcap)
            slope = slope * tanh.square_().neg_().add_(1.0)
        return slope


@dataclass
class PartialStats:
    """Softmax statistics of each row over one slice of the vocabulary, every tensor of shape [N].

    With m the largest logit z of the slice: `sum_exp` = s = sum exp(z - m), `shifted` = sum exp(z - m) (z - m),
    `sum_sq` = sum exp(2 (z - m)). Shifting by m keeps every term at most 1 in magnitude, so the entropy
    log s - shifted / s suffers no cancellation however large the logits are. `target_logit` is -inf while
    the target's slice has not been seen. `weighted_row`, of shape [N, H], is sum exp(z - m) (dz / dx) weight:
    what a frozen head's gradient is made of (`tiled.hidden_grad`).
    """

    max: Tensor
    sum_exp: Tensor
    target_logit: Tensor
    shifted: Tensor | None = None
    sum_sq: Tensor | None = None
    argmax: Tensor | None = None
    weighted_row: Tensor | None = None

    def finalize(self, targets: Tensor, stats: Sequence[str], vocab_size: int) -> TokenStats:
        """The token statistics, once the slices cover the whole vocabulary."""
        # log p_j = d_j - log s with d_j = z_j - m; the derivation is at the top of `triton_forward`
        log_sum = self.sum_exp.log()
        ignored = targets == IGNORE_INDEX
        # Not target_logit - lse: logits far from 0 would leave the rounding error of lse
        logprob = (self.target_logit - self.max) - log_sum
        values: dict[str, Tensor] = {"logprob": logprob.masked_fill_(outside(targets, vocab_size), math.nan)}
        if "entropy" in stats:
            assert self.shifted is not None
            # -sum p_j (d_j - log s)
            values["entropy"] = log_sum - self.shifted / self.sum_exp
        if "lse" in stats:
            values["lse"] = self.max + log_sum
        if "max_logprob" in stats:
            values["max_logprob"] = -log_sum
        if "log_sum_sq_probs" in stats:
            assert self.sum_sq is not None
            # sum p_j^2 = q / s^2
            values["log_sum_sq_probs"] = self.sum_sq.log() - 2 * log_sum
        values = {name: value.masked_fill_(ignored, 0.0) for name, value in values.items()}
        if "argmax" in stats:
            assert self.argmax is not None
            values["argmax"] = self.argmax.masked_fill(ignored, -1)
        return TokenStats(**values)


def merge(a: PartialStats, b: PartialStats) -> PartialStats:
    """Join the statistics of two disjoint slices; `a` covers the lower token ids.

    With m = max(m_a, m_b) and r_i = exp(m_i - m):
    s = s_a r_a + s_b r_b,   q = q_a r_a^2 + q_b r_b^2,   e = sum_i r_i (e_i + s_i (m_i - m)).
    """
    maximum = torch.maximum(a.max, b.max)
    # A slice whose logits are all -inf has m_i = m = -inf: its difference is 0, not NaN
    delta_a, delta_b = (torch.where(x.max == maximum, torch.zeros_like(maximum), x.max - maximum) for x in (a, b))
    r_a, r_b = delta_a.exp(), delta_b.exp()
    merged = PartialStats(
        max=maximum,
        sum_exp=a.sum_exp * r_a + b.sum_exp * r_b,
        target_logit=torch.maximum(a.target_logit, b.target_logit),
    )
    if a.shifted is not None and b.shifted is not None:
        merged.shifted = r_a * _shift(a.shifted, a.sum_exp, delta_a) + r_b * _shift(b.shifted, b.sum_exp, delta_b)
    if a.sum_sq is not None and b.sum_sq is not None:
        merged.sum_sq = a.sum_sq * r_a.square() + b.sum_sq * r_b.square()
    if a.argmax is not None and b.argmax is not None:
        merged.argmax = torch.where(b.max > a.max, b.argmax, a.argmax)  # equal: the lower id wins
    if a.weighted_row is not None and b.weighted_row is not None:
        merged.weighted_row = a.weighted_row * r_a.unsqueeze(1) + b.weighted_row * r_b.unsqueeze(1)
    return merged


def _shift(shifted: Tensor, sum_exp: Tensor, delta: Tensor) -> Tensor:
    # e + s delta, which the caller multiplies by r = exp(delta). At delta = -inf that is 0 times -inf, NaN; at
    # -1e4 r is 0 already, so the bound changes no value
    return shifted + sum_exp * delta.clamp(min=-1e4)


def allocate(
    shape: tuple[int, ...], stats: Sequence[str], dtype: torch.dtype, device: torch.device
) -> PartialStats:
    """Uninitialised PartialStats of any shape, with the fields that `stats` needs."""

    def empty(needed: bool, dtype: torch.dtype = dtype) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=device) if needed else None

    maximum, sum_exp, target_logit = (torch.empty(shape, dtype=dtype, device=device) for _ in range(3))
    return PartialStats(
        maximum,
        sum_exp,
        target_logit,
        shifted=empty("entropy" in stats),
        sum_sq=empty("log_sum_sq_probs" in stats),
        argmax=empty("argmax" in stats, torch.int64),
    )


def outside(targets: Tensor, vocab_size: int) -> Tensor:
    """Mask [N] of the targets that are neither a token's id nor IGNORE_INDEX."""
    return ((targets < 0) | (targets >= vocab_size)) & (targets != IGNORE_INDEX)
