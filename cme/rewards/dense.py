"""CME a token: which part of a response's log-likelihood each of the policy's tokens has, though the verifier has
other tokens, and what that makes of its advantage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cme.errors import ModelError
from cme.rendering import Messages
from cme.reward import verifier_prompts
from cme.scoring import ResponseScore
from cme.verifier import Verifier

Span = tuple[int, int]
"""[start, end) of a token in the text, in characters."""


class DenseLikelihood:
    """CME as a reward, of which `token_rewards` keeps each token's part, for `token_advantages`.

    Attributes:
        token_rewards: of the last call, for each response one number a token of `completion_ids`, whose mean is
            the response's reward; None where there is no reward, or tokens can't be found in the text.
    """

    __name__ = "cme_dense"

    def __init__(
        self, verifier: Verifier, tokenizer: PreTrainedTokenizerBase, prompt_column: str | None = None
    ) -> None:
        """`tokenizer` is the policy's. Raises ModelError unless it is a fast one."""
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} does not say where tokens lie: it is not a fast tokenizer"
            )
        self.verifier = verifier
        self.tokenizer = tokenizer
        self.prompt_column = prompt_column
        self.token_rewards: list[list[float] | None] = []

    def __call__(
        self,
        prompts: Sequence[str | Messages],
        completions: Sequence[str | Messages],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[float | None]:
        seen = verifier_prompts(prompts, columns, self.prompt_column)
        scores = self.verifier.score(seen, completions, token_spans=True)
        self.token_rewards = [self._of_tokens(s, ids) for s, ids in zip(scores, completion_ids, strict=True)]
        return [score.mean_logprob for score in scores]

    def _of_tokens(self, score: ResponseScore, ids: Sequence[int]) -> list[float] | None:
        if score.tokens is None or score.alignment is None:
            return None
        try:
            text, spans = decoded(self.tokenizer, ids)
        except Exception:  # a tokenizer that decodes a token in one way now and in another later
            return None
        if text != score.alignment.text:
            return None
        values = spread(score.tokens.logprob.tolist(), score.alignment.spans, spans)
        # sum_t values_t / T_verifier is the mean log-likelihood; it is to be the mean over the policy's tokens
        return [value * len(ids) / score.num_tokens for value in values]


def token_advantages(
    advantages: Tensor,
    token_rewards: Sequence[Sequence[float] | None],
    num_tokens: int,
    total: Callable[[Tensor], Tensor] = lambda value: value,
) -> Tensor:
    """[B, num_tokens]: a response's advantage A [B], and on top of it how far each of its tokens differs from it.

    A_t = A + (r_t - mean_t r) / std(r - mean r), the standard deviation over all tokens of the generation batch,
    so that a response's mean over its tokens is A as in GRPO. A response without token rewards has A everywhere.
    `total` sums over processes.
    """
    differences = torch.zeros(len(advantages), num_tokens, device=advantages.device)
    count = 0
    for row, rewards in zip(differences, token_rewards, strict=True):
        if rewards:
            values = torch.tensor(rewards, device=row.device)
            row[: len(values)] = values - values.mean()
            count += len(values)
    squares, tokens = total(torch.stack([differences.square().sum(), torch.tensor(float(count)).to(differences)]))
    return advantages.unsqueeze(1) + differences / ((squares / tokens.clamp(min=1)).sqrt() + 1e-4)


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
    start, end = torch.tensor(spans, dtype=torch.float64).view(-1, 2, 1).unbind(1)
    onto_start, onto_end = torch.tensor(onto, dtype=torch.float64).T
    overlap = torch.minimum(end, onto_end) - torch.maximum(start, onto_start)  # below 0, minus their distance
    shared = overlap.clamp(min=0)
    nearest = torch.zeros_like(shared).scatter_(1, overlap.argmax(1, keepdim=True), 1.0)
    shared = torch.where(shared.sum(1, keepdim=True) > 0, shared, nearest)
    weights = shared / shared.sum(1, keepdim=True)
    result: list[float] = (torch.tensor(values, dtype=torch.float64) @ weights).tolist()
    return result
