"""Per-token log-probabilities from an LM head, without logits. Needs torch; Triton where it exists."""

from cme_kernels.linear_logprob import linear_logprob
from cme_kernels.stats import IGNORE_INDEX, TokenStats

__all__ = ["IGNORE_INDEX", "TokenStats", "linear_logprob"]
