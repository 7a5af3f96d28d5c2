"""Reward functions for TRL from their names: functions of a step's responses, which each model scores once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from operator import neg
from statistics import fmean
from typing import Any, Literal

import torch

from cme.diagnostics import words
from cme.errors import CMEError, ModelError
from cme.policy import Policy, PolicyTokens
from cme.reward import CMEReward, verifier_prompts
from cme.rewards.names import DENSE, Reward, parse_rewards
from cme.scores import ResponseScore, combine
from cme.text.messages import Conversations, text_of
from cme.verifier import Verifier, random_verifier

Values = list[float | None]
"""One number per response; None for a response that can't be scored."""


def build_rewards(
    names: Sequence[str],
    cme: CMEReward,
    policy: Policy | None = None,
    load_verifier: Callable[[str], Verifier] = Verifier.from_pretrained,
) -> list[Callable[..., Values]]:
    """Reward functions for TRL's GRPOTrainer, in the order of `names`.

    The first of them, which TRL calls first, scores the responses for all: each (prompt, response) pair passes
    once through each verifier and once through the policy. It logs CMEReward's diagnostics, and CME's mean as
    `rewards/cme/mean` where CME is none of `names`.

    A response that one of several rewards can't score has none of them. TRL would sum up the others, and without
    its log-likelihood, which is negative, an empty response would have the highest sum.

    Args:
        names: as `--reward` takes them, see `cme.rewards.names`; "cme-dense" needs a DenseCMEReward for `cme`.
        cme: with the verifier, and the prompts that it sees.
        policy: the model in training, which "entropy", "self-certainty" and "log-ratio" need.
        load_verifier: a verifier by the name of its model, for "cme-min" and "cme-mean"; each is loaded once.

    Raises CMEError for names that make no sense, and for a policy that is missing or caps its logits.
    """
    rewards = parse_rewards(names)
    if [reward.name for reward in rewards] in (["cme"], [DENSE]):
        return [cme]
    needs_policy = [reward.name for reward in rewards if reward.needs_policy]
    if needs_policy and policy is None:
        raise CMEError(
            f"the reward {needs_policy[0]!r} scores the model in training: give build_rewards its Policy"
        )
    if "self-certainty" in needs_policy and policy is not None and policy.caps_logits:
        raise ModelError("self-certainty needs logits linear in the hidden states, and this model caps them")
    load = cache(load_verifier)
    functions = {reward.name.replace("-", "_"): _function(reward, cme.verifier, load) for reward in rewards}
    joint = _JointRewards(functions, partial(RewardBatch, cme, policy))
    return [joint.for_trl(name) for name in functions]


@dataclass(frozen=True)
class RewardBatch:
    """Prompts and responses of one step, of which each model scores each pair once.

    Attributes:
        columns: everything else that TRL passes, such as `completion_ids` and the columns of the dataset.
    """

    cme: CMEReward
    policy: Policy | None
    prompts: Conversations
    completions: Conversations
    columns: Mapping[str, Any]
    _scores_of: dict[Verifier, list[ResponseScore]] = field(default_factory=dict, init=False)

    @cached_property
    def scores(self) -> list[ResponseScore]:
        """Scores by CME's verifier."""
        return self.cme.score(self.prompts, self.completions, self.columns)

    def scores_of(self, verifier: Verifier) -> list[ResponseScore]:
        """Scores by a verifier, given the prompts that CME's sees."""
        if verifier == self.cme.verifier:
            return self.scores
        if verifier not in self._scores_of:
            seen = verifier_prompts(self.prompts, self.columns, self.cme.prompt_column)
            self._scores_of[verifier] = verifier.score(seen, self.completions)
        return self._scores_of[verifier]

    @cached_property
    def policy_tokens(self) -> list[PolicyTokens | None]:
        """The policy's own tokens of each response; None for one without."""
        assert self.policy is not None
        return self.policy.score(self.prompts, self.columns["completion_ids"])


Function = Callable[[RewardBatch], Values]


class _JointRewards:
    """Rewards that are computed together."""

    def __init__(self, functions: Mapping[str, Function], batch: Callable[..., RewardBatch]) -> None:
        self._functions = functions
        self._batch = batch
        self._completions: Any = None
        self._values: dict[str, Values] = {}

    def for_trl(self, name: str) -> Callable[..., Values]:
        is_first = name == next(iter(self._functions))

        def reward(prompts: Any, completions: Any, **columns: Any) -> Values:
            # The first always computes anew: the policy may have changed since the same responses came
            if is_first or completions is not self._completions:
                self._compute(prompts, completions, **columns)
            return self._values[name]

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
        batch = self._batch(prompts, completions, columns)
        batch.cme.log(prompts, completions, batch.scores, columns, log_extra, log_metric)
        known = [value for value in likelihood(batch.cme.verifier, batch) if value is not None]
        if log_metric is not None and "cme" not in self._functions and known:
            log_metric("rewards/cme/mean", fmean(known))
        rows = zip(*(function(batch) for function in self._functions.values()), strict=True)
        all_or_none = [[None] * len(row) if None in row else row for row in rows]
        self._values = {name: [row[i] for row in all_or_none] for i, name in enumerate(self._functions)}
        self._completions = completions


def _function(reward: Reward, verifier: Verifier, load: Callable[[str], Verifier]) -> Function:
    match reward.name:
        case "cme":
            return partial(likelihood, verifier)
        case "random-verifier":
            return partial(likelihood, random_verifier(verifier, reward.option))
        case "pmi":
            return partial(pmi, reward.option)
        case "cme-min":
            return partial(ensemble, [verifier, *map(load, reward.option)], "max")
        case "cme-mean":
            return partial(ensemble, [verifier, *map(load, reward.option)], "mean")
    return _PLAIN[reward.name]


def likelihood(verifier: Verifier, batch: RewardBatch) -> Values:
    """Cross-Model Entropy: the mean log-likelihood per token under a verifier, nats."""
    return [score.mean_logprob for score in batch.scores_of(verifier)]


def ensemble(verifiers: Sequence[Verifier], how: Literal["max", "mean"], batch: RewardBatch) -> Values:
    """Minus the most bits per byte under one of the verifiers, or minus their mean: tokenizers make no difference
    to the scale."""
    return _each(neg, combine([batch.scores_of(verifier) for verifier in verifiers], how, "bits_per_byte"))


def pmi(weight: float, batch: RewardBatch) -> Values:
    """CME minus `weight` times that under an empty prompt; with weight 1 the pointwise mutual information of
    question and response per token. A response that is likely after any question gains nothing."""
    alone = batch.cme.verifier.score([""] * len(batch.completions), batch.completions)
    own = [score.mean_logprob for score in alone]
    return _each(lambda given, without: given - weight * without, likelihood(batch.cme.verifier, batch), own)


def verifier_entropy(batch: RewardBatch) -> Values:
    """Minus the mean entropy of the verifier's next-token distributions: how sure it is, whatever was said."""
    return _each(neg, [score.mean_entropy for score in batch.scores])


def length(batch: RewardBatch) -> Values:
    """Minus the number of the policy's tokens, the end of the turn included."""
    return [-float(len(ids)) for ids in batch.columns["completion_ids"]]


def majority(batch: RewardBatch) -> Values:
    """Self-consistency for short answers (Wang et al. 2023; as a reward, TTRL, Zuo et al. 2025): the share of the
    responses to the same prompt that give the same answer, itself included, in (0, 1].

    Answers are the same when their case-folded words are. A group is all responses to a prompt in one call; where
    several processes share a group, each has its own vote. None for a response without words.
    """
    pairs = zip(batch.prompts, batch.completions, strict=True)
    votes = [(repr(prompt), tuple(words(text_of(completion)))) for prompt, completion in pairs]
    count = Counter(vote for vote in votes if vote[1])
    voters = Counter(prompt for prompt, answer in votes if answer)
    return [count[prompt, answer] / voters[prompt] if answer else None for prompt, answer in votes]


def self_certainty(batch: RewardBatch) -> Values:
    """Mean over tokens of KL(U || p), p the policy's next-token distribution (Zhao et al. 2025, Intuitor)."""
    return _each(lambda tokens: float(tokens.self_certainty.double().mean()), batch.policy_tokens)


def entropy(batch: RewardBatch) -> Values:
    """Minus the mean entropy of the policy's distributions: entropy minimisation (Agarwal et al. 2025)."""
    return _each(lambda tokens: -float(tokens.entropy.double().mean()), batch.policy_tokens)


def log_ratio(batch: RewardBatch) -> Values:
    """(log p_verifier(y | x) - log p_policy(y | x)) / T. Times T, its mean over the policy's samples is minus the
    KL divergence of the policy from the verifier, the reverse KL.

    T is the number of the policy's tokens without special ones: the verifier does not score the end of the turn.
    """
    assert batch.policy is not None
    added = batch.policy.tokenizer.added_tokens_decoder.items()  # all_special_ids lacks Gemma's <end_of_turn>
    special = torch.tensor([i for i, token in added if token.special])

    def ratio(ids: Sequence[int], tokens: PolicyTokens, total: float) -> float | None:
        own = tokens.logprob[~torch.isin(torch.tensor(ids), special)].double()  # [T]
        return (total - float(own.sum())) / len(own) if len(own) else None

    totals = [score.sum_logprob for score in batch.scores]
    return _each(ratio, batch.columns["completion_ids"], batch.policy_tokens, totals)


_PLAIN: dict[str, Function] = {
    "length": length,
    "majority": majority,
    "self-certainty": self_certainty,
    "entropy": entropy,
    "log-ratio": log_ratio,
    "verifier-entropy": verifier_entropy,
}


def _each(combined: Callable[..., float | None], *columns: Sequence[Any]) -> Values:
    """`combined` of each response's values; None where one of them is."""
    rows = zip(*columns, strict=True)
    return [None if any(value is None for value in row) else combined(*row) for row in rows]
