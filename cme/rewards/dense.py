"""A response's log-likelihood as rewards of the policy's tokens, though the verifier has other tokens."""

from __future__ import annotations

from collections.abc import Sequence

Span = tuple[int, int]
"""[start, end) of a token in the text, in characters."""


def spread(values: Sequence[float], spans: Sequence[Span], onto: Sequence[Span]) -> list[float]:
    """Values of tokens `spans` as values of tokens `onto` of the same text; their sum stays what it was.

    A token's value goes to the tokens that overlap it, in proportion to the characters in common. One that
    overlaps none (the end of a turn, or what one tokenizer drops) gives all to the nearest, the first of several.

    Raises ValueError if there is no token to give to, or not a span for each value.
    """
    if len(values) != len(spans):
        raise ValueError(f"{len(values)} values for {len(spans)} spans")
    if not onto:
        if values:
            raise ValueError("no tokens to spread the values over")
        return []
    result = [0.0] * len(onto)
    for value, span in zip(values, spans, strict=True):
        shared = [_overlap(span, other) for other in onto]
        total = sum(shared)
        if total:
            for i, characters in enumerate(shared):
                result[i] += value * characters / total
        else:
            result[min(range(len(onto)), key=lambda i: _distance(span, onto[i]))] += value
    return result


def _overlap(a: Span, b: Span) -> int:
    return max(min(a[1], b[1]) - max(a[0], b[0]), 0)


def _distance(a: Span, b: Span) -> int:
    return max(b[0] - a[1], a[0] - b[1], 0)
