"""Scores -> signals with one direction: higher means more likely right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cme.evaluation.correctness.data import Response
from cme.evaluation.correctness.metrics import Floats
from cme.evaluation.correctness.scores import Score

SIGNS = {
    "mean_logprob": 1,
    "sum_logprob": 1,
    "perplexity": -1,
    "mean_entropy": -1,
    "bits_per_byte": -1,
    "top1_rate": 1,
}
"""Signals of the verifier, and what they are multiplied with: lower perplexity, entropy and bits are better."""

CONTROL_SIGNALS = ("mean_logprob", "mean_entropy")
HEADLINE = "verifier/mean_logprob"
ANSWER_HEADLINE = "verifier/answer_mean_logprob"


@dataclass(frozen=True)
class Signal:
    """Attributes:
    name: MODEL/signal; MODEL/answer_signal for the answer alone.
    control: not the verifier's.
    sign: of the raw number in `values`.
    values: float64 [N], higher meaning more likely right.
    """

    name: str
    control: bool
    sign: int
    values: Floats

    @property
    def of_answer(self) -> bool:
        return "/answer_" in self.name


def signals_of(
    responses: Sequence[Response], scores: Mapping[str, Sequence[Score]], sampled: bool
) -> list[Signal]:
    """Every signal of the responses, all of which must have been scored by every model.

    Args:
        scores: by model; "verifier" is one of them.
        sampled: a majority of a question's responses means something.
    """
    found = {r.span not in (None, (0, len(r.text))) for r in responses}
    parts = ("", "answer_") if True in found else ("",)  # else they are the same
    signals = [
        Signal(f"{model}/{part}{name}", model != "verifier", sign, sign * _column(scores[model], part + name))
        for model in scores
        for part in parts
        for name, sign in SIGNS.items()
        if model == "verifier" or name in CONTROL_SIGNALS
    ]
    signals.append(Signal("length/tokens", True, -1, -_column(scores["verifier"], "num_tokens")))
    if sampled and len({r.question for r in responses}) < len(responses):
        signals.append(Signal("self-consistency/vote", True, 1, _votes(responses)))
    return signals


def _column(scores: Sequence[Score], name: str) -> Floats:
    return np.array([score[name] for score in scores], dtype=np.float64)


def _votes(responses: Sequence[Response]) -> Floats:
    """The share of a question's responses that give the same answer."""
    same = Counter((r.question, r.answer) for r in responses)
    size = Counter(r.question for r in responses)
    return np.array([same[r.question, r.answer] / size[r.question] for r in responses])
