"""Entropy of a model on its own responses, and its divergence from another model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cme.evaluation.options import Generation
from cme.evaluation.text.metrics import Means, Side
from cme.policy import Policy
from cme.text.messages import Messages
from cme.text.rendering import Renderer


def policy_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, generation: Generation) -> Policy:
    """The whole distribution, before top-p cuts it, at the responses' temperature (1 where they are greedy)."""
    return Policy(
        model.eval().requires_grad_(False),
        tokenizer,
        temperature=generation.temperature or 1.0,
        chat_template_kwargs=generation.chat_template_kwargs,
    )


def likelihood_metrics(
    policy: Policy, start: Policy | None, asked: Mapping[str, str | Messages], side: Side, template: str = "auto"
) -> Means:
    """Mean entropy per token, in nats, of the model's distributions in its own responses, and estimates of
    KL(policy || start) per token, in nats, if there is a model `start`. It needs the same vocabulary.

    With r = p_start / p_policy of a sampled token, k1 = -log r is unbiased and of high variance, and
    k3 = r - 1 - log r unbiased too and never negative (Schulman 2020, "Approximating KL divergence"). Tokens are
    those of the text, which for a few responses differ from the sampled ones. The end of the turn is not in the
    text, so that a change in where responses end is not in the estimates.

    Args:
        asked: the model's input for each prompt of `side`.
    """
    kwargs = policy.chat_template_kwargs if policy.tokenizer.chat_template else None
    renderer = Renderer.of(policy.tokenizer, template, kwargs)
    responses = [response for group in side.values() for response in group]
    ids = [renderer.response_ids(response.text) for response in responses]
    prompts = [asked[response.prompt] for response in responses]
    own = policy.score(prompts, ids)
    per_token = {"entropy": [None if p is None else p.entropy for p in own]}
    if start is not None:
        start = replace(start, tokenizer=policy.tokenizer)  # the same prompt, whatever chat template it has itself
        other = start.score(prompts, ids)
        log_r = [
            None if p is None or q is None else (q.logprob - p.logprob).double()
            for p, q in zip(own, other, strict=True)
        ]
        per_token["kl_k1"] = [None if x is None else -x for x in log_r]
        per_token["kl_k3"] = [None if x is None else x.exp() - 1 - x for x in log_r]
    means: Means = {}
    for name, values in per_token.items():
        tokens: dict[str, list[Tensor]] = defaultdict(list)
        for response, value in zip(responses, values, strict=True):
            if value is not None:
                tokens[response.prompt].append(value)
        means[name] = {prompt: float(torch.cat(some).double().mean()) for prompt, some in tokens.items()}
    return means
