"""Several rewards as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cme.reward import CMEReward

Reward = Callable[..., list[float | None]]
"""A reward function in TRL's form."""


class Combined:
    """Makes one number a response of those of several rewards: their mean, their minimum, a weighted sum.

    None where any of them is None.
    """

    def __init__(self, rewards: Sequence[Reward], combine: Callable[[Sequence[float]], float], name: str) -> None:
        self.rewards = rewards
        self.combine = combine
        self.__name__ = name

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        parts = [reward(prompts=prompts, completions=completions, **columns) for reward in self.rewards]
        rows = zip(*parts, strict=True)
        return [None if None in row else self.combine([v for v in row if v is not None]) for row in rows]


class Observed:
    """A reward beside which everything is logged that CMEReward logs, and its mean as `rewards/cme/mean`: runs
    with different rewards have the same columns."""

    def __init__(self, reward: Reward, cme: CMEReward) -> None:
        self.reward = reward
        self.cme = cme
        self.__name__ = str(getattr(reward, "__name__", type(reward).__name__))

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        likelihood = self.cme(prompts, completions, log_metric=log_metric, **columns)
        known = [value for value in likelihood if value is not None]
        if log_metric is not None and known:
            log_metric("rewards/cme/mean", sum(known) / len(known))
        return self.reward(prompts=prompts, completions=completions, **columns)
