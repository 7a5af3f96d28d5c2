"""Responses in batches, whatever the tokenizer has to pad them with."""

import pytest
import tiny

from cme.evaluation.generate import Sampling, generate

PROMPTS = ["What is the capital of France?", "What?", "The capital of France is Paris. Question: What is"]


@pytest.mark.parametrize("special", [("pad_token",), ("pad_token", "eos_token")])
def test_a_tokenizer_needs_no_padding_token(special):
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    wanted = [
        generate(model, tokenizer, [p], Sampling(samples=1, max_new_tokens=8), greedy=True)[0] for p in PROMPTS
    ]
    for name in special:
        setattr(tokenizer, name, None)
    assert generate(model, tokenizer, PROMPTS, Sampling(samples=1, max_new_tokens=8), greedy=True) == wanted
    assert len({response.text for response in wanted}) == 3
