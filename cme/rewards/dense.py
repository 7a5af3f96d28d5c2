"""CME per token: the part of a response's log-likelihood that each of the policy's tokens has, though the verifier
has other tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from cme.errors import ModelError
from cme.reward import CMEReward
from cme.scores import ResponseScore
from cme.text.messages import Conversations
from cme.text.tokens import Span
from cme.verifier import Verifier


class DenseCMEReward(CMEReward):
    """CMEReward, of which `token_rewards` keeps each token's part.

    Attributes:
        token_rewards: of the last call, for each response one number per token of `completion_ids`, whose mean
            is the response's reward; None where there is no reward, or tokens can't be found in the text. A token
            without text, as the end of a turn, has the response's mean.
    """

    _token_spans = True

    def __init__(self, verifier: Verifier | str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> None:
        """
        Args:
            tokenizer: the policy's.
            options: as in CMEReward.

        Raises:
            ModelError: the tokenizer is not a fast one.
        """
        super().__init__(verifier, **options)
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} does not say where tokens lie: it is not a fast tokenizer"
            )
        self.tokenizer = tokenizer
        self.token_rewards: list[list[float] | None] = []
        self._has_aligned = False

    def score(
        self, prompts: Conversations, completions: Conversations, columns: Mapping[str, Any]
    ) -> list[ResponseScore]:
        """As CMEReward's. Raises ModelError if the tokens of none of the first responses are found in the text."""
        scores = super().score(prompts, completions, columns)
        pairs = zip(scores, columns["completion_ids"], strict=True)
        self.token_rewards = [self._of_tokens(score, ids) for score, ids in pairs]
        rewarded = sum(score.mean_logprob is not None for score in scores)
        self._has_aligned = self._has_aligned or any(self.token_rewards)
        if rewarded and not self._has_aligned:
            raise ModelError(
                f"in none of the {rewarded} responses of the first step are the tokens of "
                f"{self.tokenizer.name_or_path} found in the verifier's text: use --reward cme"
            )
        return scores

    def _metrics(self, scores: Sequence[ResponseScore]) -> dict[str, float]:
        aligned = sum(rewards is not None for rewards in self.token_rewards)
        rewarded = sum(score.mean_logprob is not None for score in scores)
        return super()._metrics(scores) | ({"dense_rate": aligned / rewarded} if rewarded else {})

    def _of_tokens(self, score: ResponseScore, ids: Sequence[int]) -> list[float] | None:
        if score.tokens is None or score.alignment is None:
            return None
        try:
            text, spans = decoded(self.tokenizer, ids)
        except Exception:  # a tokenizer that decodes the same token in several ways
            return None
        if text != score.alignment.text:
            return None
        onto = [span for span in spans if span[0] < span[1]]
        # sum_t values_t / T_verifier is the mean log-likelihood; it is to be the mean over the policy's tokens
        scale = len(onto) / score.num_tokens
        values = iter(spread(score.tokens.logprob.tolist(), score.alignment.spans, onto))
        mean = float(score.tokens.logprob.double().mean())
        return [next(values) * scale if start < end else mean for start, end in spans]


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, list[Span]]:
    """The text of `ids` without special tokens, and where each lies in it. Tokens that are parts of one character
    have all of it, special tokens an empty span."""
    stream = DecodeStream(skip_special_tokens=True)
    special = set(tokenizer.all_special_ids)
    text, spans, waiting = "", [], 0
    for token in ids:
        piece = stream.step(tokenizer.backend_tokenizer, token) or ""
        start, text = len(text), text + piece
        spans.append((start, len(text)))
        if piece:
            spans[-1 - waiting :] = [spans[-1]] * (waiting + 1)
        waiting = 0 if piece or token in special else waiting + 1
    return text, spans


def spread(values: Sequence[float], spans: Sequence[Span], onto: Sequence[Span]) -> list[float]:
    """Values of tokens `spans` as values of tokens `onto` of the same text, with the same sum. Both are
    in the order of the text.

    A token's value goes to the tokens that overlap it, in proportion to the characters in common. One that
    overlaps none (the end of a turn, or a text that one tokenizer drops) gives all to the nearest.

    Raises ValueError if there is no token to give to, or not a span for each value.
    """
    if len(values) != len(spans):
        raise ValueError(f"{len(values)} values for {len(spans)} spans")
    if values and not onto:
        raise ValueError("no tokens to spread the values over")
    result = [0.0] * len(onto)
    first = 0
    for value, (start, end) in zip(values, spans, strict=True):
        while first < len(onto) - 1 and onto[first][1] <= start:
            first += 1
        shared: dict[int, int] = {}
        i = first
        while i < len(onto) and onto[i][0] < end:
            shared[i] = min(end, onto[i][1]) - max(start, onto[i][0])
            i += 1
        overlap = {i: characters for i, characters in shared.items() if characters > 0}
        if not overlap:
            near = [i for i in (first - 1, first) if i >= 0]
            overlap = {min(near, key=lambda i: max(onto[i][0] - end, start - onto[i][1])): 1}
        for i, characters in overlap.items():
            result[i] += value * characters / sum(overlap.values())
    return result
