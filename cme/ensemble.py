"""The scores of several verifiers as one number a response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Literal

from cme.scoring import ResponseScore

How = Literal["mean", "min", "max"]
_HOW: dict[How, Callable[[Sequence[float]], float]] = {"mean": fmean, "min": min, "max": max}


def combine(
    scores: Sequence[Sequence[ResponseScore]], how: How = "mean", signal: str = "mean_logprob"
) -> list[float | None]:
    """The mean, the least or the greatest of what several verifiers say about each response.

    Verifiers with different tokenizers cut a response into different numbers of tokens, so that their nats per
    token are on different scales: among them `bits_per_byte` is comparable, of which "max" is the cautious value,
    as "min" is of `mean_logprob`.

    Args:
        scores: of each verifier, its scores of the same responses in the same order.
        how: "mean", "min" or "max".
        signal: a property of ResponseScore that is a number.

    Returns:
        One number a response; None unless every verifier has one, for a number over fewer of them would be about
        other models than the next response's.

    Raises:
        ValueError: another `how`, or verifiers that have not scored equally many responses.
    """
    if how not in _HOW:
        raise ValueError(f"how={how!r} is none of {', '.join(map(repr, _HOW))}")
    if len({len(of_verifier) for of_verifier in scores}) > 1:
        raise ValueError(
            f"the verifiers have scored {[len(s) for s in scores]} responses: give the same ones to all"
        )
    each = ([getattr(score, signal) for score in of_response] for of_response in zip(*scores, strict=True))
    return [None if None in values else _HOW[how](values) for values in each]
