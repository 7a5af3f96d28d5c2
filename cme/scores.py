"""Scores of responses and of their tokens, as values and as tables, and several verifiers' scores combined."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from cme.errors import ModelError
from cme.text.tokens import Alignment
from cme_kernels import TokenStats

if TYPE_CHECKING:
    import pandas

SIGNALS = ("mean_logprob", "sum_logprob", "perplexity", "mean_entropy", "bits_per_byte", "top1_rate", "num_tokens")
"""Numbers per response: the properties of ResponseScore by these names."""

SIGNAL_STATS = ("entropy", "max_logprob")
"""The statistics of tokens that all of SIGNALS need."""


@dataclass(frozen=True)
class TokenScore:
    """One token of a response under the verifier, given everything before it.

    Attributes:
        id: in the verifier's vocabulary.
        text: of the token decoded on its own; "\ufffd" where it is a part of a character.
        start, end: its characters, response_text[start:end]. Tokens that are parts of one character all have that
            character; a space that the template put before the response has none, nor has the end of the turn.
        logprob: nats.
        entropy: of the verifier's distribution at this place, nats; None if not requested.
        top1: it was the verifier's first choice; None if not requested.
    """

    id: int
    text: str
    start: int
    end: int
    logprob: float
    entropy: float | None
    top1: bool | None


@dataclass(frozen=True)
class ResponseScore:
    """Statistics of a response's tokens under a verifier, given its prompt.

    Attributes:
        tokens: statistics per token, float32 on the CPU, shape [T]; None if the response could not be scored.
        token_ids: the T tokens in the verifier's vocabulary.
        num_bytes: length of the response in UTF-8.
        unscorable: the reason if there is no score, else None.
        finished: True if the response ended by itself, False if it was cut off, None if nobody knows.
        alignment: where the tokens lie in the response's text, if that was asked for.
        unaligned: the reason if `alignment` was asked for and could not be found, else None.
    """

    tokens: TokenStats | None
    token_ids: tuple[int, ...]
    num_bytes: int
    unscorable: str | None = None
    finished: bool | None = None
    alignment: Alignment | None = None
    unaligned: str | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def sum_logprob(self) -> float | None:
        """log p(response | prompt), nats."""
        return None if self.tokens is None else float(self.tokens.logprob.double().sum())

    @property
    def mean_logprob(self) -> float | None:
        """log p(response | prompt) / T, nats per token: the Cross-Model Entropy reward."""
        return None if self.tokens is None else float(self.tokens.logprob.double().mean())

    @property
    def perplexity(self) -> float | None:
        """exp(-mean_logprob); infinite where that exceeds the largest float."""
        mean = self.mean_logprob
        try:
            return None if mean is None else math.exp(-mean)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """-log2 p(response | prompt) / bytes: comparable between tokenizers."""
        total = self.sum_logprob
        return None if total is None else -total / (math.log(2) * self.num_bytes)

    @property
    def mean_entropy(self) -> float | None:
        """Mean entropy of the verifier's next-token distributions, nats; needs stats=("entropy",)."""
        return _mean(None if self.tokens is None else self.tokens.entropy)

    @property
    def top1_rate(self) -> float | None:
        """Share of tokens that were the verifier's most likely ones; needs stats=("max_logprob",)."""
        return _mean(None if self.tokens is None else _is_top1(self.tokens))

    def as_dict(self) -> dict[str, float | int | bool | str | None]:
        """SIGNALS, `finished` and `unscorable` by name. Signals are None where there is no score, or where the
        statistics for them were not requested."""
        signals = {name: None if self.tokens is None else getattr(self, name) for name in SIGNALS}
        return {**signals, "finished": self.finished, "unscorable": self.unscorable}

    def per_token(self) -> list[TokenScore]:
        """The T tokens in order, none if there is no score. Needs token_spans=True.

        Raises ModelError if the tokens could not be found in the text (`unaligned`).
        """
        if self.tokens is None:
            return []
        alignment = self._aligned()
        unknown = [None] * self.num_tokens
        top1 = _is_top1(self.tokens)
        columns = zip(
            self.token_ids,
            alignment.pieces,
            alignment.spans,
            self.tokens.logprob.tolist(),
            unknown if self.tokens.entropy is None else self.tokens.entropy.tolist(),
            unknown if top1 is None else top1.tolist(),
            strict=True,
        )
        return [TokenScore(id_, text, *span, *values) for id_, text, span, *values in columns]

    def within(self, start: int, end: int) -> ResponseScore:
        """The part [start, end) of the response, in characters of its text, scored alone: given the prompt and the
        response before it, by the tokens that overlap it. Needs token_spans=True.

        `num_bytes` is that of the text which those tokens cover, which may be more than the part.
        Raises ModelError if the tokens could not be found in the text (`unaligned`).
        """
        if self.tokens is None:
            return self
        alignment = self._aligned()
        if not 0 <= start < end <= len(alignment.text):
            reason = f"the span [{start}, {end}) is not within the response's {len(alignment.text)} characters"
            return ResponseScore(None, (), 0, reason, self.finished)
        kept = [i for i, (a, b) in enumerate(alignment.spans) if a < end and b > start]
        if not kept:  # a tokenizer may drop characters
            return ResponseScore(None, (), 0, f"no token overlaps the span [{start}, {end})", self.finished)
        part = alignment.select(kept)
        covered = alignment.text[part.spans[0][0] : max(b for _, b in part.spans)]
        ids = tuple(self.token_ids[i] for i in kept)
        return ResponseScore(_select(self.tokens, kept), ids, len(covered.encode()), None, self.finished, part)

    def _aligned(self) -> Alignment:
        if self.unaligned is not None:
            raise ModelError(self.unaligned)
        if self.alignment is None:
            raise ValueError("where the tokens lie in the text was not asked for: score with token_spans=True")
        return self.alignment


def to_frame(scores: Iterable[ResponseScore]) -> pandas.DataFrame:
    """One row per response: `ResponseScore.as_dict`."""
    import pandas

    return pandas.DataFrame([score.as_dict() for score in scores], columns=[*SIGNALS, "finished", "unscorable"])


def tokens_to_frame(scores: Iterable[ResponseScore]) -> pandas.DataFrame:
    """One row per token: the fields of TokenScore, and `response`, the position of its response in `scores`. A
    response whose tokens could not be found in its text has none."""
    import pandas

    rows = [
        {"response": i, **asdict(token)}
        for i, score in enumerate(scores)
        if score.unaligned is None
        for token in score.per_token()
    ]
    return pandas.DataFrame(rows, columns=["response", *(f.name for f in fields(TokenScore))])


def _is_top1(tokens: TokenStats) -> Tensor | None:
    return None if tokens.max_logprob is None else tokens.logprob >= tokens.max_logprob


def _select(tokens: TokenStats, index: list[int]) -> TokenStats:
    columns = {name: value[index] for name in TokenStats.names() if (value := getattr(tokens, name)) is not None}
    return TokenStats(**columns)


def _mean(values: Tensor | None) -> float | None:
    return None if values is None else float(values.double().mean())


How = Literal["mean", "min", "max"]
_HOW: dict[How, Callable[[Sequence[float]], float]] = {"mean": fmean, "min": min, "max": max}


def combine(
    scores: Sequence[Sequence[ResponseScore]], how: How = "mean", signal: str = "mean_logprob"
) -> list[float | None]:
    """The mean, the least or the greatest of several verifiers' signals of each response.

    Verifiers with different tokenizers cut a response into different numbers of tokens, so that their nats per
    token are on different scales: among them `bits_per_byte` is comparable, of which "max" is the cautious value,
    as "min" is of `mean_logprob`.

    Args:
        scores: of each verifier, its scores of the same responses in the same order.
        how: "mean", "min" or "max".
        signal: a property of ResponseScore that is a number.

    Returns:
        One number per response; None unless every verifier has one, for a number over fewer of them would be about
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
