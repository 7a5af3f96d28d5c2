"""Rewards by name as reward functions for TRL: functions of a batch of responses, which each model scores once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property, partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from cme.diagnostics import words
from cme.policy import Policy, stacked
from cme.reward import CMEReward, verifier_prompts
from cme.rewards.names import DENSE, RewardName, parse_rewards
from cme.scores import ResponseScore, combine
from cme.text.messages import Messages, text_of
from cme.verifier import Verifier, random_verifier

Rewards = list[float | None]
"""One per response; None for a response that can't be scored."""


def build_rewards(
    names: Sequence[str],
    cme: CMEReward,
    policy: Policy | None = None,
    load_verifier: Callable[[str], Verifier] = Verifier.from_pretrained,
) -> list[Callable[..., Rewards]]:
    """Reward functions for TRL's GRPOTrainer, in the order of `names`, each called after its name.

    The first of them, which TRL calls first, scores the responses for all: each (prompt, response) pair passes
    once through each verifier and once through the policy. It logs what CMEReward logs, and CME's mean as
    `rewards/cme/mean` where CME is none of `names`.

    A response that one of several rewards can't score has none of them: TRL would sum up the others, and an empty
    response would have no likelihood but its length, which is more than any sum of both.

    Args:
        names: as `--reward` takes them, see `cme.rewards.names`; "cme-dense" needs a DenseCMEReward for `cme`.
        cme: with the verifier, and the prompts that it sees.
        policy: the model in training, which "entropy", "self-certainty" and "log-ratio" need.
        load_verifier: a verifier by the name of its model, for "cme-min" and "cme-mean"; each is loaded once.

    Raises CMEError for names that make no sense.
    """
    rewards = parse_rewards(names)
    if [reward.name for reward in rewards] in (["cme"], [DENSE]):
        return [cme]
    load = cache(load_verifier)
    functions = {reward.name.replace("-", "_"): _function(reward, cme.verifier, load) for reward in rewards}
    signals = tuple(_SIGNALS[reward.name] for reward in rewards if reward.name in _SIGNALS)
    return _RewardSet(functions, partial(RewardBatch, cme, policy, signals)).for_trl()


class RewardBatch:
    """Prompts and responses of one step, and what models say about them."""

    def __init__(
        self,
        cme: CMEReward,
        policy: Policy | None,
        signals: Sequence[str],
        prompts: Sequence[str | Messages],
        completions: Sequence[str | Messages],
        columns: Mapping[str, Any],
    ) -> None:
        """
        Args:
            signals: those of `policy` that are asked for, in one pass.
            columns: what TRL passes besides, such as `completion_ids` and the columns of the dataset.
        """
        self.cme = cme
        self.policy = policy
        self.prompts = prompts
        self.completions = completions
        self.columns = columns
        self.scores = cme.score(prompts, completions, columns)
        self._signals = signals
        self._scores_of: dict[Verifier, list[ResponseScore]] = {cme.verifier: self.scores}

    @property
    def completion_ids(self) -> Sequence[Sequence[int]]:
        """The policy's tokens of each response."""
        ids: Sequence[Sequence[int]] = self.columns["completion_ids"]
        return ids

    def scores_of(self, verifier: Verifier) -> list[ResponseScore]:
        """Scores by another verifier than CME's, given the same prompts."""
        if verifier not in self._scores_of:
            seen = verifier_prompts(self.prompts, self.columns, self.cme.prompt_column)
            self._scores_of[verifier] = verifier.score(seen, self.completions)
        return self._scores_of[verifier]

    def per_token(self, signal: str) -> list[Tensor | None]:
        """Values [T] of the policy's tokens in each response; None for one without tokens."""
        i = self._signals.index(signal)
        return [None if values is None else values[:, i].double() for values in self._policy_values]

    @cached_property
    def _policy_values(self) -> list[Tensor | None]:  # [T, number of signals] per response
        assert self.policy is not None, "this reward scores the model in training: give it as `policy`"
        signals = [getattr(self.policy, name) for name in self._signals]
        return self.policy.per_token(self.prompts, self.completion_ids, stacked(signals))


class _RewardSet:
    """The rewards of one run."""

    def __init__(
        self, functions: Mapping[str, Callable[[RewardBatch], Rewards]], score: Callable[..., RewardBatch]
    ) -> None:
        self._functions = functions
        self._score = score
        self._completions: Any = None
        self._rewards: dict[str, Rewards] = {}

    def for_trl(self) -> list[Callable[..., Rewards]]:
        return [self._for_trl(name, is_first=i == 0) for i, name in enumerate(self._functions)]

    def _for_trl(self, name: str, is_first: bool) -> Callable[..., Rewards]:
        def reward(prompts: Any, completions: Any, **columns: Any) -> Rewards:
            # The same completions may come again after a step of the policy, whose scores have then changed
            if is_first or completions is not self._completions:
                self._compute(prompts, completions, **columns)
            return self._rewards[name]

        reward.__name__ = name  # of the columns and metrics that TRL logs
        return reward

    def _compute(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> None:
        batch = self._score(prompts, completions, columns)
        batch.cme.log(prompts, completions, batch.scores, columns, log_extra, log_metric)
        likelihood = [score.mean_logprob for score in batch.scores if score.mean_logprob is not None]
        if log_metric is not None and "cme" not in self._functions and likelihood:
            log_metric("rewards/cme/mean", fmean(likelihood))
        found = {name: function(batch) for name, function in self._functions.items()}
        missing = [None in values for values in zip(*found.values(), strict=True)]
        self._rewards = {
            name: [None if none else value for none, value in zip(missing, values, strict=True)]
            for name, values in found.items()
        }
        self._completions = completions


def _function(
    reward: RewardName, verifier: Verifier, load: Callable[[str], Verifier]
) -> Callable[[RewardBatch], Rewards]:
    match reward.name:
        case "pmi":
            return partial(pmi, weight=reward.option)
        case "random-verifier":
            return partial(likelihood_under, random_verifier(verifier, reward.option))
        case "cme-min":
            return partial(least_likelihood, [verifier, *map(load, reward.option)])
        case "cme-mean":
            return partial(mean_likelihood, [verifier, *map(load, reward.option)])
    return _PLAIN[reward.name]


def likelihood(batch: RewardBatch) -> Rewards:
    """Cross-Model Entropy: the mean log-likelihood per token, nats."""
    return [score.mean_logprob for score in batch.scores]


def verifier_entropy(batch: RewardBatch) -> Rewards:
    """Minus the mean entropy of the verifier's next-token distributions: how sure it is, whatever was said."""
    return [None if score.mean_entropy is None else -score.mean_entropy for score in batch.scores]


def likelihood_under(verifier: Verifier, batch: RewardBatch) -> Rewards:
    """CME under another verifier."""
    return [score.mean_logprob for score in batch.scores_of(verifier)]


def pmi(batch: RewardBatch, weight: float) -> Rewards:
    """CME minus `weight` times that under an empty prompt; with weight 1 the pointwise mutual information of
    question and response per token. What is likely after any question gains nothing."""
    without = batch.cme.verifier.score([""] * len(batch.completions), batch.completions)
    pairs = [(a.mean_logprob, b.mean_logprob) for a, b in zip(batch.scores, without, strict=True)]
    return [None if a is None or b is None else a - weight * b for a, b in pairs]


def least_likelihood(verifiers: Sequence[Verifier], batch: RewardBatch) -> Rewards:
    """Minus the most bits per byte that a verifier needs: on one scale, whatever the tokenizers are."""
    return _negated(combine([batch.scores_of(verifier) for verifier in verifiers], "max", "bits_per_byte"))


def mean_likelihood(verifiers: Sequence[Verifier], batch: RewardBatch) -> Rewards:
    """Minus the mean of the verifiers' bits per byte."""
    return _negated(combine([batch.scores_of(verifier) for verifier in verifiers], "mean", "bits_per_byte"))


def length(batch: RewardBatch) -> Rewards:
    """Minus the number of the policy's tokens, the end of the turn included."""
    return [-float(len(ids)) for ids in batch.completion_ids]


def majority(batch: RewardBatch) -> Rewards:
    """Self-consistency for short answers (Wang et al. 2023; as a reward, TTRL, Zuo et al. 2025): the share of the
    responses to the same prompt that give the same answer, itself included, in (0, 1].

    Answers are the same when their case-folded words are. A group is what one call has of a prompt; a run in which
    several processes share a group votes within each. None for a response without words.
    """
    pairs = zip(batch.prompts, batch.completions, strict=True)
    votes = [(repr(prompt), tuple(words(text_of(completion)))) for prompt, completion in pairs]
    count = Counter(vote for vote in votes if vote[1])
    voters = Counter(prompt for prompt, answer in votes if answer)
    return [count[prompt, answer] / voters[prompt] if answer else None for prompt, answer in votes]


def self_certainty(batch: RewardBatch) -> Rewards:
    """Mean over tokens of KL(U || p), p the policy's next-token distribution (Zhao et al. 2025, Intuitor)."""
    return [None if values is None else float(values.mean()) for values in batch.per_token("self_certainty")]


def entropy(batch: RewardBatch) -> Rewards:
    """Minus the mean entropy of the policy's distributions: entropy minimisation (Agarwal et al. 2025)."""
    return [None if values is None else -float(values.mean()) for values in batch.per_token("entropy")]


def log_ratio(batch: RewardBatch) -> Rewards:
    """(log p_verifier(y | x) - log p_policy(y | x)) / T. Times T, its mean over the policy's samples is minus the
    KL divergence of the policy from the verifier, the reverse KL.

    T is the number of the policy's tokens without special ones: the verifier does not score the end of the turn.
    """
    assert batch.policy is not None
    added = batch.policy.tokenizer.added_tokens_decoder.items()
    special = torch.tensor(
        [i for i, token in added if token.special]
    )  # all_special_ids lacks Gemma's <end_of_turn>
    rewards: Rewards = []
    for ids, values, score in zip(batch.completion_ids, batch.per_token("logprob"), batch.scores, strict=True):
        own = torch.empty(0) if values is None else values[~torch.isin(torch.tensor(ids), special)]  # [T]
        total = score.sum_logprob
        rewards.append(None if total is None or not len(own) else (total - float(own.sum())) / len(own))
    return rewards


_PLAIN: dict[str, Callable[[RewardBatch], Rewards]] = {
    "cme": likelihood,
    "length": length,
    "majority": majority,
    "self-certainty": self_certainty,
    "entropy": entropy,
    "log-ratio": log_ratio,
    "verifier-entropy": verifier_entropy,
}

_SIGNALS = {"self-certainty": "self_certainty", "entropy": "entropy", "log-ratio": "logprob"}
"""What a reward asks of the policy, by the name of its method."""


def _negated(values: Rewards) -> Rewards:
    return [None if value is None else -value for value in values]
