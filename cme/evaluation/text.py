"""Label-free numbers that show a policy gaming its reward: likelihood favours short, repeated and copied text."""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Case-folded words, without punctuation."""
    return _WORD.findall(text.casefold())


def repeated_ngram_rate(text: str, n: int = 4) -> float:
    """Share of the text's word n-grams that occurred before in it, in [0, 1]; 0 below n words."""
    tokens = words(text)
    ngrams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def prompt_copy_rate(response: str, prompt: str) -> float:
    """Share of the response's words that occur in the prompt, in [0, 1]; 0 for an empty response."""
    tokens, known = words(response), set(words(prompt))
    return sum(token in known for token in tokens) / len(tokens) if tokens else 0.0


def is_echo(response: str, prompt: str) -> bool:
    """The response has words, and none that the prompt does not have."""
    return prompt_copy_rate(response, prompt) == 1.0


def diagnose(prompt: str, response: str) -> dict[str, float]:
    """The diagnostics of one response, by the names under which they are logged."""
    return {
        "repeated_4gram_rate": repeated_ngram_rate(response),
        "prompt_copy_rate": prompt_copy_rate(response, prompt),
        "echo_rate": float(is_echo(response, prompt)),
    }
