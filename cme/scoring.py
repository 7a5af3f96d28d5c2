"""What a verifier says about one response."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from cme_kernels import TokenStats


@dataclass(frozen=True)
class ResponseScore:
    """Statistics of a response's tokens under a verifier, given its prompt.

    Attributes:
        tokens: statistics a token, float32 on the CPU, shape [T]; None if the response could not be scored.
        token_ids: the T tokens in the verifier's vocabulary.
        num_bytes: length of the response in UTF-8.
        unscorable: why there is no score, else None.
    """

    tokens: TokenStats | None
    token_ids: tuple[int, ...]
    num_bytes: int
    unscorable: str | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def sum_logprob(self) -> float | None:
        """log p(response | prompt), nats."""
        return None if self.tokens is None else float(self.tokens.logprob.double().sum())

    @property
    def mean_logprob(self) -> float | None:
        """log p(response | prompt) / T, nats a token: the Cross-Model Entropy reward."""
        return None if self.tokens is None else float(self.tokens.logprob.double().mean())

    @property
    def perplexity(self) -> float | None:
        """exp(-mean_logprob)."""
        mean = self.mean_logprob
        return None if mean is None else math.exp(-mean)

    @property
    def bits_per_byte(self) -> float | None:
        """-log2 p(response | prompt) / bytes: comparable between tokenizers."""
        total = self.sum_logprob
        return None if total is None else -total / (math.log(2) * self.num_bytes)

    @property
    def mean_entropy(self) -> float | None:
        """Mean entropy of the verifier's next-token distributions, nats; needs stats=("entropy",)."""
        return _mean(None if self.tokens is None else self.tokens.entropy)

    @property
    def top1_rate(self) -> float | None:
        """Share of tokens that were the verifier's most likely ones; needs stats=("max_logprob",)."""
        if self.tokens is None or self.tokens.max_logprob is None:
            return None
        return _mean((self.tokens.logprob >= self.tokens.max_logprob).double())


def _mean(values: Tensor | None) -> float | None:
    return None if values is None else float(values.double().mean())
