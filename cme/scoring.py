"""Requests -> statistics of their tokens -> what they say about a response."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cme.errors import ModelError
from cme.lm_head import input_device, score_batch
from cme.memory import OutOfMemoryError, is_out_of_memory, keep_freed_memory, release, token_budget, trim
from cme.packing import Batch, Request, make_batches
from cme_kernels import TokenStats


def score_requests(
    model: PreTrainedModel,
    requests: Sequence[Request],
    stats: Sequence[str] = (),
    *,
    max_batch_tokens: int | Literal["auto"] = "auto",
    packed: bool = True,
    on_scored: Callable[[int], object] = lambda count: None,
) -> list[TokenStats]:
    """Statistics of each request's response tokens, on the CPU, in the order of `requests`. Equal requests are
    computed once.

    Args:
        max_batch_tokens: most tokens in one forward pass; "auto" is `cme.memory.token_budget`. Where memory runs
            out, half as many are tried, down to one request at a time.
        on_scored: called after each batch with the number of requests in it.

    Raises:
        ModelError: a token id that the model doesn't know.
        ValueError: a budget that is not positive.
        OutOfMemoryError: one request alone needs more memory than there is.
    """
    if max_batch_tokens != "auto" and max_batch_tokens < 1:
        raise ValueError(f"max_batch_tokens must be positive or 'auto', not {max_batch_tokens}")
    _check_ids(model, requests)
    copies = Counter(requests)
    budget = token_budget(model) if max_batch_tokens == "auto" else max_batch_tokens
    device = input_device(model)
    results: dict[Request, TokenStats] = {}
    with torch.inference_mode(), keep_freed_memory():
        while waiting := [request for request in copies if request not in results]:
            for batch in make_batches(waiting, budget, device, packed):
                scored = _scored_if_memory_lasts(model, batch, stats)
                if scored is None:
                    budget = _half(batch)
                    release(device)
                    break
                members = [waiting[i] for i in batch.members]
                results.update(zip(members, scored, strict=True))
                trim()  # else the results pin the memory of the pass around them
                on_scored(sum(copies[request] for request in members))
    return [results[request] for request in requests]


def _scored_if_memory_lasts(model: PreTrainedModel, batch: Batch, stats: Sequence[str]) -> list[TokenStats] | None:
    # The error holds the tensors of the failed pass, so it must be gone before the next is tried
    try:
        return _split(score_batch(model, batch, stats), batch)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None


def _half(batch: Batch) -> int:
    """The token budget after `batch` was too much."""
    tokens = batch.inputs["input_ids"].numel()
    if len(batch.members) == 1:
        raise OutOfMemoryError(
            f"out of memory in a forward pass over one request of {tokens} tokens: shorten it, load the model in "
            "bfloat16, or free memory"
        )
    return tokens // 2


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
