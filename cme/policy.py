"""The model in training, scored on its own tokens without gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cme.engine.attention import IMPLEMENTATION
from cme.engine.forward import compute_requests, hidden_rows
from cme.engine.lm_head import LMHead
from cme.engine.packing import Batch, Request
from cme.engine.selfcheck import evaluating
from cme.text.messages import Conversations
from cme.text.rendering import encode_prompt


@dataclass(frozen=True)
class PolicyTokens:
    """Numbers per token of a response, float32 [T] on the CPU, in nats.

    Attributes:
        logprob: log p(token).
        entropy: of the distribution p of the next token.
        self_certainty: KL(U || p), U uniform over the vocabulary; None where logits are capped.
    """

    logprob: Tensor
    entropy: Tensor
    self_certainty: Tensor | None = None


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

    @cached_property
    def caps_logits(self) -> bool:
        """Logits are no linear function of the hidden states, so that there is no self-certainty."""
        return LMHead.of(self.model).softcap is not None

    def score(self, prompts: Conversations, completion_ids: Sequence[Sequence[int]]) -> list[PolicyTokens | None]:
        """Numbers of each response's tokens; None for one without tokens.

        Raises MemoryError for a response that memory is too small for.
        """
        requests = [
            Request(tuple(encode_prompt(self.tokenizer, prompt, self.chat_template_kwargs)), tuple(ids))
            for prompt, ids in zip(prompts, completion_ids, strict=True)
            if len(ids)
        ]
        packed = self.model.config._attn_implementation == IMPLEMENTATION
        with evaluating(self.model):
            found = compute_requests(
                self.model, requests, self._score_batch, max_batch_tokens=self.max_batch_tokens, packed=packed
            )
        results = iter(found)
        return [_computed(next(results)) if len(ids) else None for ids in completion_ids]

    def _score_batch(self, batch: Batch) -> list[PolicyTokens]:
        # Not in inference mode: training could not use what the model keeps of such a pass
        head, hidden = LMHead.of(self.model), hidden_rows(self.model, batch)  # [N, H]
        stats = head.token_stats(hidden, batch.targets, ("entropy", "lse"), self.temperature)  # [N] each
        assert stats.entropy is not None
        assert stats.lse is not None
        columns = [stats.logprob, stats.entropy]
        if not self.caps_logits:
            columns.append(_self_certainty(head, hidden, stats.lse, self.temperature))
        rows = zip(*(column.float().cpu().split(batch.lengths) for column in columns), strict=True)
        return [PolicyTokens(*row) for row in rows]


def _self_certainty(head: LMHead, hidden: Tensor, lse: Tensor, temperature: float) -> Tensor:
    """KL(U || p) [N] from hidden states [N, H] and the logits' log-sum-exp [N].

    KL(U || p) = -1/V sum_j log(V p_j) = lse(z) - mean_j z_j - log V, and as z = W h + b is linear, its mean is
    mean_j(W_j) . h + mean_j(b_j): no logits are needed.
    """
    projection = head.projection
    mean = hidden.float() @ projection.weight.mean(0, dtype=torch.float32)
    if projection.bias is not None:
        mean = mean + projection.bias.float().mean()
    return lse - mean * head.scale / temperature - math.log(len(projection.weight))


def _computed(result: PolicyTokens | str) -> PolicyTokens:
    if isinstance(result, str):
        raise MemoryError(result)
    return result
