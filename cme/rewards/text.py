"""Rewards that read nothing but the responses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from cme.diagnostics import words
from cme.text.rendering import Messages, text_of


class Length:
    """Shorter is better: minus the number of the policy's tokens, the end of the turn included."""

    __name__ = "length"

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float | None]:
        return [-float(len(ids)) for ids in completion_ids]


class MajorityVote:
    """Self-consistency for short answers (Wang et al. 2023; as a reward, TTRL, Zuo et al. 2025): the share of the
    responses to the same prompt that give the same answer, itself included, in (0, 1].

    Answers are the same when their case-folded words are. A group is what one call has of a prompt; a run in which
    several processes share a group votes within each. None for a response without words.
    """

    __name__ = "majority"

    def __call__(
        self, prompts: Sequence[str | Messages], completions: Sequence[str | Messages], **_: Any
    ) -> list[float | None]:
        votes = [(repr(p), tuple(words(text_of(c)))) for p, c in zip(prompts, completions, strict=True)]
        count = Counter(vote for vote in votes if vote[1])
        voters = Counter(prompt for prompt, answer in votes if answer)
        return [count[prompt, answer] / voters[prompt] if answer else None for prompt, answer in votes]
