"""Rewards from a verifier other than its mean log-likelihood, and a verifier that knows nothing."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from cme.reward import verifier_prompts
from cme.text.rendering import Messages
from cme.verifier import Verifier


class Likelihood:
    """CMEReward without what it logs, to take part in others.

    `per_byte` rewards minus bits per byte, which verifiers with different tokenizers have on one scale.
    """

    def __init__(
        self,
        verifier: Verifier,
        prompt_column: str | None = None,
        name: str = "likelihood",
        per_byte: bool = False,
    ) -> None:
        self.per_byte = per_byte
        self.verifier = verifier
        self.prompt_column = prompt_column
        self.__name__ = name

    def __call__(
        self, prompts: Sequence[str | Messages], completions: Sequence[str | Messages], **columns: Any
    ) -> list[float | None]:
        seen = verifier_prompts(prompts, columns, self.prompt_column)
        scores = self.verifier.score(seen, completions)
        if self.per_byte:
            return [None if score.bits_per_byte is None else -score.bits_per_byte for score in scores]
        return [score.mean_logprob for score in scores]


class VerifierEntropy:
    """Minus the mean entropy of the verifier's next-token distributions: how sure it is, whatever was said."""

    __name__ = "verifier_entropy"

    def __init__(self, verifier: Verifier, prompt_column: str | None = None) -> None:
        self.verifier = verifier
        self.prompt_column = prompt_column

    def __call__(
        self, prompts: Sequence[str | Messages], completions: Sequence[str | Messages], **columns: Any
    ) -> list[float | None]:
        seen = verifier_prompts(prompts, columns, self.prompt_column)
        scores = self.verifier.score(seen, completions, stats=("entropy",))
        return [None if s.mean_entropy is None else -s.mean_entropy for s in scores]


class WithoutQuestion:
    """Mean log-likelihood minus `weight` times that under an empty prompt; with weight 1 pointwise mutual
    information of question and response, a token. What is likely after any question gains nothing."""

    __name__ = "pmi"

    def __init__(self, verifier: Verifier, prompt_column: str | None = None, weight: float = 1.0) -> None:
        self.verifier = verifier
        self.prompt_column = prompt_column
        self.weight = weight

    def __call__(
        self, prompts: Sequence[str | Messages], completions: Sequence[str | Messages], **columns: Any
    ) -> list[float | None]:
        seen = verifier_prompts(prompts, columns, self.prompt_column)
        scores = self.verifier.score([*seen, *[""] * len(seen)], [*completions, *completions])
        means = [score.mean_logprob for score in scores]
        pairs = zip(means[: len(seen)], means[len(seen) :], strict=True)
        return [None if a is None or b is None else a - self.weight * b for a, b in pairs]


def random_verifier(verifier: Verifier, seed: int = 0) -> Verifier:
    """The verifier's architecture, tokenizer and template, with weights as they are before pretraining."""
    model = verifier.model
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        fresh = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    renderer = verifier.renderer
    return Verifier.of(
        fresh.to(model.device),
        renderer.tokenizer,
        template=renderer.template or "chat",
        chat_template_kwargs=renderer.chat_template_kwargs,
        score_thoughts=renderer.score_thoughts,
        max_batch_tokens=verifier.max_batch_tokens,
    )
