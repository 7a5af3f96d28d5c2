"""Scores of EleutherAI's lm-evaluation-harness."""

import pytest

from cme.text.templates import PLAIN_TEMPLATE

PROMPTS = ["What is the capital of France?"] * 3 + ["Where?"] * 2
RESPONSES = ["Paris.", "The capital of France is Paris.", "naïve 🙂", "Here!", "In the north, I think."]


def harness_scores(model, tokenizer, prompts, responses):
    """log p(response | prompt) in nats, and whether greedy decoding would have given the response."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    before, after = PLAIN_TEMPLATE.split("{prompt}")
    after = after.removesuffix(" {response}")
    pairs = [(before + p + after, f" {r}") for p, r in zip(prompts, responses, strict=True)]
    harness = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1)
    instances = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return harness.loglikelihood(instances, disable_tqdm=True)


def assert_agree(verifier, harness_model, prompts, responses):
    theirs = harness_scores(harness_model, verifier.renderer.tokenizer, prompts, responses)
    ours = verifier.score(prompts, responses, stats=("max_logprob",))
    for score, (total, greedy) in zip(ours, theirs, strict=True):
        assert score.sum_logprob == pytest.approx(total, abs=2e-5 * score.num_tokens)
        assert (score.top1_rate == 1) == greedy
