"""Scores of responses under a verifier: `python examples/score.py [MODEL]`."""

import sys

from cme import Verifier

verifier = Verifier.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "gemma-3-270m")
prompts = ["What is the capital of France?"] * 3
responses = ["The capital of France is Paris.", "The capital of France is Lyon.", ""]
for response, score in zip(responses, verifier.score(prompts, responses), strict=True):
    print(f"{response!r}: {score.mean_logprob if score.unscorable is None else score.unscorable}")
