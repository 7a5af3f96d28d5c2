"""The model in training, scored on its own tokens without gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cme.engine.attention import IMPLEMENTATION
from cme.engine.forward import compute_requests, hidden_rows
from cme.engine.lm_head import LMHead
from cme.engine.packing import Batch, Request
from cme.engine.selfcheck import evaluating
from cme.errors import ModelError
from cme.text.messages import Conversations
from cme.text.rendering import encode_prompt

Signal = Callable[[LMHead, Tensor, Tensor], Tensor]
"""A value [N] or S values [N, S] per token, from the head, the hidden states [N, H] that predict the tokens, and
the tokens [N]."""


def stacked(signals: Sequence[Signal]) -> Signal:
    """S signals in one, from one forward pass: values [N, S]."""

    def signal(head: LMHead, hidden: Tensor, targets: Tensor) -> Tensor:
        return torch.stack([one(head, hidden, targets) for one in signals], dim=1)

    return signal


@dataclass(frozen=True)
class Policy:
    """The model in training: its weights are those of the moment, as the trainer changes them in place.

    Attributes:
        model: without wrappers, its weights whole (no FSDP, no ZeRO-3); of a PEFT model its base, with the
            adapters in it.
        temperature: of the distribution that responses are sampled from.
        max_batch_tokens: most tokens in one forward pass; "auto" goes by the free memory.
        chat_template_kwargs: variables of the chat template that responses are sampled with.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    temperature: float = 1.0
    max_batch_tokens: int | Literal["auto"] = "auto"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def per_token(
        self, prompts: Conversations, completion_ids: Sequence[Sequence[int]], signal: Signal
    ) -> list[Tensor | None]:
        """float32 [T], or [T, S], on the CPU for each response; None for one without tokens.

        Raises MemoryError for a response that memory is too small for.
        """
        requests = [
            Request(tuple(encode_prompt(self.tokenizer, prompt, self.chat_template_kwargs)), tuple(ids))
            if len(ids)
            else None
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]
        packed = self.model.config._attn_implementation == IMPLEMENTATION
        head = LMHead.of(self.model)

        def compute(batch: Batch) -> Sequence[Tensor]:
            values = signal(head, hidden_rows(self.model, batch), batch.targets)  # [N] or [N, S]
            return values.float().cpu().split(batch.lengths)

        present = [request for request in requests if request is not None]
        with evaluating(self.model):
            results = iter(
                compute_requests(
                    self.model, present, compute, max_batch_tokens=self.max_batch_tokens, packed=packed
                )
            )
        return [None if request is None else _computed(next(results)) for request in requests]

    def logprob(self, head: LMHead, hidden: Tensor, targets: Tensor) -> Tensor:
        """A signal: log p(token), nats."""
        return head.token_stats(hidden, targets, (), self.temperature).logprob

    def entropy(self, head: LMHead, hidden: Tensor, targets: Tensor) -> Tensor:
        """A signal: entropy of the distribution, nats."""
        entropy = head.token_stats(hidden, targets, ("entropy",), self.temperature).entropy
        assert entropy is not None
        return entropy

    def self_certainty(self, head: LMHead, hidden: Tensor, targets: Tensor) -> Tensor:
        """A signal: KL(U || p) in nats, U uniform over the V tokens. Raises ModelError for capped logits.

        KL(U || p) = -1/V sum_j log(V p_j) = lse(z) - mean_j z_j - log V, and as z = W h + b is linear, its mean is
        mean_j(W_j) . h + mean_j(b_j): no logits are needed.
        """
        if head.softcap is not None:
            raise ModelError("self-certainty needs logits linear in the hidden states, and these are capped")
        lse = head.token_stats(hidden, targets, ("lse",), self.temperature).lse
        assert lse is not None
        projection = head.projection
        mean = hidden.float() @ projection.weight.mean(0, dtype=torch.float32)
        if projection.bias is not None:
            mean = mean + projection.bias.float().mean()
        return lse - mean * head.scale / self.temperature - math.log(len(projection.weight))


def _computed(result: Tensor | str) -> Tensor:
    if isinstance(result, str):
        raise MemoryError(result)
    return result
