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
    """A model's whole distribution, before top-p cuts it, at the responses' temperature (1 where it is greedy)."""
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
    own = other = policy.score(prompts, ids)
    if start is not None:  # given the same tokens of the prompt, whatever chat template it has itself
        other = replace(start, tokenizer=policy.tokenizer).score(prompts, ids)
    found: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for response, p, q in zip(responses, own, other, strict=True):
        if p is None or q is None:
            continue
        log_r = (q.logprob - p.logprob).double()  # [T]
        values = {"entropy": p.entropy}
        values |= {} if start is None else {"kl_k1": -log_r, "kl_k3": log_r.exp() - 1 - log_r}
        for name, value in values.items():
            found[name][response.prompt].append(value)
    return {
        name: {prompt: float(torch.cat(tokens).double().mean()) for prompt, tokens in by_prompt.items()}
        for name, by_prompt in found.items()
    }
