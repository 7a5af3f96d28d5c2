"""Label-free numbers that show a policy gaming its reward: likelihood favours short, repeated and copied text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


def distinct_rate(texts: Sequence[str], n: int) -> float | None:
    """Distinct word n-grams over all of them, in several texts together (distinct-n, Li et al. 2016), in (0, 1];
    None if no text has n words."""
    ngrams = [tuple(w[i : i + n]) for w in map(words, texts) for i in range(len(w) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None


def byte_counts(texts: Sequence[str]) -> NDArray[np.int64]:
    """The count of each of the 256 byte values in the texts' UTF-8, [256]."""
    data = "".join(texts).encode(errors="surrogatepass")
    return np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)


def jensen_shannon(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Jensen-Shannon divergence of two histograms, in bits, in [0, 1]; NaN if one is empty.

    With P and Q the normalised histograms and M = (P + Q) / 2 it is (KL(P || M) + KL(Q || M)) / 2. Another script
    has other bytes, another language other shares of letters, so byte histograms show both, for any language.
    """
    if not a.sum() or not b.sum():
        return float("nan")
    from scipy.special import rel_entr  # not scipy's own divergence: it is the root, NaN for rounding below 0

    p, q = a / a.sum(), b / b.sum()
    m = (p + q) / 2
    return float((rel_entr(p, m) + rel_entr(q, m)).sum() / (2 * np.log(2)))
