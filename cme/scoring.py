"""Requests -> statistics of their tokens -> what they say about a response."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cme.errors import ModelError
from cme.lm_head import score_batch
from cme.packing import Batch, Request, make_batches
from cme_kernels import TokenStats


def score_requests(
    model: PreTrainedModel,
    requests: Sequence[Request],
    stats: Sequence[str] = (),
    *,
    max_batch_tokens: int,
    packed: bool = True,
    on_scored: Callable[[int], object] = lambda count: None,
) -> list[TokenStats]:
    """Statistics of each request's response tokens, on the CPU, in the order of `requests`. Equal requests are
    computed once.

    `on_scored` is called after each batch with the number of requests in it.
    """
    _check_ids(model, requests)
    copies = Counter(requests)
    distinct = list(copies)
    results: dict[Request, TokenStats] = {}
    with torch.inference_mode():
        for batch in make_batches(distinct, max_batch_tokens, model.device, packed):
            members = [distinct[i] for i in batch.members]
            results.update(zip(members, _split(score_batch(model, batch, stats), batch), strict=True))
            on_scored(sum(copies[request] for request in members))
    return [results[request] for request in requests]


def _split(stats: TokenStats, batch: Batch) -> list[TokenStats]:
    columns = {
        name: value.cpu().split(batch.lengths)
        for name in TokenStats.names()
        if (value := getattr(stats, name)) is not None
    }
    return [TokenStats(**{n: parts[k] for n, parts in columns.items()}) for k in range(len(batch.members))]


def _check_ids(model: PreTrainedModel, requests: Sequence[Request]) -> None:
    # An id beyond the embedding is a device-side assertion on a GPU, so it is caught before it gets there
    vocab_size: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[index, assignment]
    for request in requests:
        largest = max(max(request.prompt), max(request.response))
        if largest >= vocab_size or min(min(request.prompt), min(request.response)) < 0:
            raise ModelError(
                f"token id {largest} is outside the verifier's vocabulary of {vocab_size}: "
                "the tokenizer does not belong to this model"
            )


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
