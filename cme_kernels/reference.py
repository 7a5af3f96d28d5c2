"""The oracle: every statistic in float64 from full logits. The only place where logits exist; for tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cme_kernels.stats import IGNORE_INDEX, LogitTransform, TokenStats, outside


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    stats: Sequence[str],
    dtype: torch.dtype = torch.float64,
) -> TokenStats:
    """All of `linear_logprob`, by the definitions, differentiable by plain autograd.

    `dtype` is the type of every operation: float64 for the oracle; float32 or bfloat16 give the eager
    computation that errors are compared with.
    """
    # x = h W^T + b, then z = c tanh(a x / c) / T or a x / T
    z = hidden.to(dtype) @ weight.to(dtype).T  # [N, V]
    if bias is not None:
        z = z + bias.to(dtype)
    z = z * transform.logit_scale
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    temperature = transform.temperature
    z = z / (temperature.to(dtype).unsqueeze(1) if isinstance(temperature, Tensor) else temperature)

    ignored = targets == IGNORE_INDEX
    log_p = z.log_softmax(-1)  # [N, V]
    p = log_p.exp()

    def masked(values: Tensor, ignored_value: float = 0) -> Tensor:
        return values.masked_fill(ignored, ignored_value)

    bad = outside(targets, len(weight))
    # gather needs an index in range where the result is overwritten, too
    logprob = log_p.gather(1, targets.masked_fill(ignored | bad, 0).unsqueeze(1)).squeeze(1)
    logprob = logprob.masked_fill(bad, torch.nan)
    return TokenStats(
        logprob=masked(logprob),
        entropy=masked(-(p * log_p).sum(-1)) if "entropy" in stats else None,
        lse=masked(z.logsumexp(-1)) if "lse" in stats else None,
        max_logprob=masked(log_p.amax(-1)) if "max_logprob" in stats else None,
        argmax=masked(z.argmax(-1), -1) if "argmax" in stats else None,
        log_sum_sq_probs=masked((2 * log_p).logsumexp(-1)) if "log_sum_sq_probs" in stats else None,
    )
