"""Rewards that ask the policy how sure it is: it is scored on its own tokens, without gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cme.attention import IMPLEMENTATION
from cme.errors import ModelError
from cme.lm_head import LMHead, backbone_of, input_device
from cme.packing import Request, make_batches
from cme.rendering import Messages, encode_prompt
from cme.reward import verifier_prompts
from cme.selfcheck import evaluating
from cme.verifier import Verifier

Signal = Callable[[LMHead, Tensor, Tensor], Tensor]
"""A value [N] a token, from the head, the hidden states [N, H] that predict the tokens, and the tokens [N]."""


@dataclass(frozen=True)
class Policy:
    """The model in training: its weights are those of the moment, as the trainer changes them in place.

    Attributes:
        model: without wrappers, its weights whole (no FSDP, no ZeRO-3); of a PEFT model its base, with the
            adapters in it.
        temperature: of the distribution that responses are sampled from.
        max_batch_tokens: most tokens in one forward pass.
        chat_template_kwargs: variables of the chat template that responses are sampled with.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    temperature: float = 1.0
    max_batch_tokens: int = 8192
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def per_token(
        self,
        prompts: Sequence[str | Messages],
        completion_ids: Sequence[Sequence[int]],
        signal: Signal,
    ) -> list[Tensor | None]:
        """float32 [T] for each response on the CPU; None for one without tokens."""
        requests = [
            Request(tuple(encode_prompt(self.tokenizer, prompt, self.chat_template_kwargs)), tuple(ids))
            if len(ids)
            else None
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]
        distinct = list(dict.fromkeys(request for request in requests if request is not None))
        packed = self.model.config._attn_implementation == IMPLEMENTATION
        found: dict[Request, Tensor] = {}
        with evaluating(self.model), torch.no_grad():
            head = LMHead.of(self.model)
            for batch in make_batches(distinct, self.max_batch_tokens, input_device(self.model), packed):
                hidden = backbone_of(self.model)(**batch.inputs, use_cache=False).last_hidden_state
                rows = hidden.flatten(0, 1).index_select(0, batch.rows)
                values = signal(head, rows, batch.targets).float().cpu().split(batch.lengths)
                found.update(zip((distinct[i] for i in batch.members), values, strict=True))
        return [None if request is None else found[request] for request in requests]

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


class SelfCertainty:
    """Mean over tokens of KL(U || p), p the policy's next-token distribution (Zhao et al. 2025, Intuitor)."""

    __name__ = "self_certainty"

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float | None]:
        return [_mean(t) for t in self.policy.per_token(prompts, completion_ids, self.policy.self_certainty)]


class TokenEntropy:
    """Minus the mean entropy of the policy's distributions: entropy minimisation (Agarwal et al. 2025)."""

    __name__ = "entropy"

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float | None]:
        values = self.policy.per_token(prompts, completion_ids, self.policy.entropy)
        return [None if t is None else -float(t.double().mean()) for t in values]


class LogRatio:
    """(log p_verifier(y | x) - log p_policy(y | x)) / T. Times T, its mean over the policy's samples is minus the
    KL divergence of the policy from the verifier, the reverse KL.

    T is the number of the policy's tokens; the end of its turn, which the verifier does not score, is left out.
    """

    __name__ = "log_ratio"

    def __init__(self, verifier: Verifier, policy: Policy, prompt_column: str | None = None) -> None:
        self.verifier = verifier
        self.policy = policy
        self.prompt_column = prompt_column

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[float | None]:
        added = self.policy.tokenizer.added_tokens_decoder.items()
        special = {i for i, token in added if token.special}  # all_special_ids lacks Gemma's <end_of_turn>
        ids = [[i for i in row if i not in special] for row in completion_ids]
        own = self.policy.per_token(prompts, ids, self.policy.logprob)
        scores = self.verifier.score(verifier_prompts(prompts, columns, self.prompt_column), completions)
        return [
            None if t is None or s.sum_logprob is None else (s.sum_logprob - float(t.double().sum())) / len(t)
            for t, s in zip(own, scores, strict=True)
        ]


def _mean(values: Tensor | None) -> float | None:
    return None if values is None else float(values.double().mean())
