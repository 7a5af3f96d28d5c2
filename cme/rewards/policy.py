"""Rewards that ask the policy how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cme.policy import Policy
from cme.reward import verifier_prompts
from cme.verifier import Verifier


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
