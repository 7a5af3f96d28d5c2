"""How far a model is from another on its own responses, and how sure each is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cme.evaluation.options import Generation
from cme.evaluation.text_report.compare import Means
from cme.evaluation.text_report.responses import Response
from cme.policy import Policy, Signal
from cme.text.rendering import Messages, Renderer

Prompts = dict[str, str | Messages]
"""What a model is asked, by the text of the prompt."""


def entropy(policy: Policy, prompts: Prompts, responses: Sequence[Response], template: str) -> dict[str, float]:
    """Mean entropy a token, in nats, of the model's distributions in its own responses' text, by prompt."""
    return _by_prompt(responses, _per_token(policy, prompts, responses, template, policy.entropy))


def kl(
    trained: Policy, start: Policy, prompts: Prompts, responses: Sequence[Response], template: str = "auto"
) -> Means:
    """Estimates of KL(trained || start) a token, in nats, from the trained model's own responses (Schulman 2020,
    "Approximating KL divergence"): with r = p_start / p_trained of a sampled token, k1 = -log r, unbiased and of
    high variance, and k3 = r - 1 - log r, unbiased too and never negative.

    Responses are tokenised from their text, which for a few differs from the tokens that were sampled. The end of
    the turn is not in it, so that a change in where responses end is not in the estimates.
    """
    own = _per_token(trained, prompts, responses, template, trained.logprob)
    other = _per_token(start, prompts, responses, template, start.logprob)
    ratios = [None if a is None or b is None else (b - a).double() for a, b in zip(own, other, strict=True)]
    k3 = [None if r is None else r.exp() - 1 - r for r in ratios]
    return {
        "kl_k1": _by_prompt(responses, [None if r is None else -r for r in ratios]),
        "kl_k3": _by_prompt(responses, k3),
    }


def same_tokens(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether log-probabilities of tokens can be compared."""
    return bool(a.get_vocab() == b.get_vocab())


def policy_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, generation: Generation) -> Policy:
    """Of the distribution that responses were sampled from; of the model's own where they are greedy."""
    return Policy(
        model.eval().requires_grad_(False),
        tokenizer,
        temperature=generation.temperature or 1.0,
        chat_template_kwargs=generation.chat_template_kwargs,
    )


def _per_token(
    policy: Policy, prompts: Prompts, responses: Sequence[Response], template: str, signal: Signal
) -> list[torch.Tensor | None]:
    kwargs = policy.chat_template_kwargs if policy.tokenizer.chat_template else None
    renderer = Renderer.of(policy.tokenizer, template, kwargs)
    ids = [renderer.response_ids(r.text) for r in responses]
    return policy.per_token([prompts[r.prompt] for r in responses], ids, signal)


def _by_prompt(responses: Sequence[Response], values: Sequence[torch.Tensor | None]) -> dict[str, float]:
    """Means over the tokens of all responses of a prompt."""
    tokens: dict[str, list[torch.Tensor]] = defaultdict(list)
    for response, value in zip(responses, values, strict=True):
        if value is not None:
            tokens[response.prompt].append(value)
    return {prompt: float(torch.cat(some).double().mean()) for prompt, some in tokens.items()}
