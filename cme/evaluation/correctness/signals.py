"""Responses and their scores -> signals, of which higher means more likely right; and all numbers of these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from cme.evaluation.correctness.metrics import (
    Bools,
    Ints,
    auroc,
    best_of_n,
    calibrate,
    mean_and_oracle,
    pair_accuracy,
    risk_area,
    selective_accuracy,
)
from cme.evaluation.statistics import Floats, mean, mean_interval, percentile_interval, resample
from cme.text.messages import Messages


@dataclass(frozen=True)
class Response:
    """A response that is right or wrong.

    Attributes:
        question: id of its question.
        prompt: what the verifier sees before the response.
        asked: what the generator was asked.
        span: the answer in `text`, [start, end) in characters; None if none was found.
        answer: what its answer says, for the majority vote; equal texts say the same.
        finished: ended by itself; None if nobody knows.
        problem: why it can't be scored, whatever the model.
    """

    question: str
    prompt: str | Messages
    asked: str | Messages
    text: str
    correct: bool
    span: tuple[int, int] | None
    answer: str
    finished: bool | None = None
    problem: str | None = None


Score = dict[str, Any]
"""Numbers of a response under a model: those of SIGNS and `num_tokens` by name, the same of the answer alone as
`answer_…`, and `unscorable`, a reason or None."""

SIGNS = {"mean_logprob": 1, "sum_logprob": 1, "mean_entropy": -1, "bits_per_byte": -1, "top1_rate": 1}
"""Signals of the verifier, and what they are multiplied with: lower entropy and bits are better."""

CONTROL_SIGNALS = ("mean_logprob", "mean_entropy")
HEADLINE = "verifier/mean_logprob"
ANSWER_HEADLINE = "verifier/answer_mean_logprob"

COVERAGES = tuple(round(0.05 * i, 2) for i in range(1, 21))
MIN_QUESTIONS = 10
"""With a right response, and with a wrong one, for a bootstrap over questions to mean something."""


@dataclass(frozen=True)
class Signal:
    """A number per response that may tell right from wrong.

    Attributes:
        name: MODEL/signal; MODEL/answer_signal for the answer alone.
        control: not the verifier's.
        sign: 1, or -1 where lower raw numbers are better, which `values` then holds negated.
        values: float64 [N], higher meaning more likely right.
    """

    name: str
    control: bool
    sign: int
    values: Floats

    @property
    def reference(self) -> str:
        """The verifier's likelihood of the same part of the response."""
        return ANSWER_HEADLINE if "/answer_" in self.name else HEADLINE


def signals_of(responses: Sequence[Response], scores: Mapping[str, Sequence[Score]]) -> list[Signal]:
    """Every signal of the responses, all of which must have been scored by every model.

    Args:
        scores: by model; "verifier" is one of them.
    """
    found = any(r.span not in (None, (0, len(r.text))) for r in responses)
    signals = [
        Signal(f"{model}/{part}{name}", model != "verifier", sign, sign * _column(scores[model], part + name))
        for model in scores
        for part in (("", "answer_") if found else ("",))  # else they are the same
        for name, sign in SIGNS.items()
        if model == "verifier" or name in CONTROL_SIGNALS
    ]
    signals.append(Signal("length/tokens", True, -1, -_column(scores["verifier"], "num_tokens")))
    if len({r.question for r in responses}) < len(responses):
        signals.append(Signal("self-consistency/vote", True, 1, _votes(responses)))
    return signals


def _column(scores: Sequence[Score], name: str) -> Floats:
    return np.array([score[name] for score in scores], dtype=np.float64)


def _votes(responses: Sequence[Response]) -> Floats:
    """The share of a question's responses that give the same answer."""
    same = Counter((r.question, r.answer) for r in responses)
    size = Counter(r.question for r in responses)
    return np.array([same[r.question, r.answer] / size[r.question] for r in responses])


def evaluate(
    responses: Sequence[Response], signals: Sequence[Signal], resamples: int, seed: int, progress: bool = False
) -> dict[str, Any]:
    """Counts, baselines, what is undefined, which is null, and every metric of every signal, by its name."""
    correct = np.array([r.correct for r in responses])
    ids = {name: i for i, name in enumerate(dict.fromkeys(r.question for r in responses))}
    question = np.array([ids[r.question] for r in responses])
    areas = _area_samples(signals, correct, question, resamples, progress)
    average, oracle = mean_and_oracle(correct, question)
    counts = _counts(correct, question)
    return {
        "counts": counts,
        "baselines": {
            "mean_accuracy": mean(average),
            "oracle_accuracy": mean(oracle),
            "risk_area_of_chance": float(1 - correct.mean()),
            "risk_area_of_oracle": risk_area(selective_accuracy(correct.astype(np.float64), correct)),
        },
        "undefined": _undefined(counts),
        "signals": {
            signal.name: {
                "control": signal.control,
                "sign": signal.sign,
                **_area(signal, signals, correct, areas),
                **_within_questions(signal, correct, question, average, resamples),
                **_selective(signal, correct),
                "calibration": calibrate(signal.values, correct, question, seed),
            }
            for signal in signals
        },
    }


def _counts(correct: Bools, question: Ints) -> dict[str, Any]:
    sizes = Counter(question.tolist())
    rights = Counter(question[correct].tolist())
    return {
        "questions": len(sizes),
        "responses": len(correct),
        "right": int(correct.sum()),
        "accuracy": float(correct.mean()),
        "questions_with_right": len(rights),
        "questions_with_wrong": sum(rights[q] < size for q, size in sizes.items()),
        "questions_with_right_and_wrong": sum(0 < rights[q] < size for q, size in sizes.items()),
        "questions_with_one_response": sum(size == 1 for size in sizes.values()),
    }


def _undefined(counts: Mapping[str, Any]) -> list[str]:
    """Reasons for which these labels leave something undefined."""
    reasons = []
    if counts["right"] in (0, counts["responses"]):
        reasons.append(
            f"AUROC, pair accuracy and calibration are undefined: all {counts['responses']} responses are "
            f"{'right' if counts['right'] else 'wrong'}"
        )
    elif counts["questions_with_right_and_wrong"] == 0:
        reasons.append("pair accuracy is undefined: no question has both right and wrong responses")
    single = counts["questions_with_one_response"]
    if single == counts["questions"]:
        reasons.append("best of N is undefined: no question has more than one response")
    elif single:
        reasons.append(f"best of N leaves out {single} questions with one response")
    few, label = min((counts[f"questions_with_{label}"], label) for label in ("right", "wrong"))
    if 0 < few < MIN_QUESTIONS:
        reasons.append(f"intervals are not to be trusted: only {few} questions have a {label} response")
    return reasons


def _area_samples(
    signals: Sequence[Signal], correct: Bools, question: Ints, resamples: int, progress: bool
) -> dict[str, Floats]:
    """AUROC in each sample of questions; the samples are the same for all signals, so differences are paired."""
    num_questions = int(question.max()) + 1
    parts: dict[str, list[Floats]] = {signal.name: [] for signal in signals}
    responses_each = -(-len(question) // num_questions)
    with tqdm(total=resamples, desc="resampling questions", unit=" samples", disable=not progress) as bar:
        for counts in resample(num_questions, resamples, width=responses_each):
            weights = counts[:, question]
            for signal in signals:
                parts[signal.name].append(auroc(signal.values, correct, weights))
            bar.update(len(counts))
    return {name: np.concatenate(each) for name, each in parts.items()}


def _area(
    signal: Signal, signals: Sequence[Signal], correct: Bools, samples: Mapping[str, Floats]
) -> dict[str, Any]:
    """AUROC, and how far it is below that of the signal's reference."""
    reference = next(s for s in signals if s.name == signal.reference)
    area, other = (float(auroc(s.values, correct)[0]) for s in (signal, reference))
    below = {
        "reference": reference.name,
        "difference": other - area,
        "interval": percentile_interval(samples[reference.name] - samples[signal.name]),
    }
    known = not np.isnan(area)
    return {
        "auroc": area if known else None,
        "auroc_interval": percentile_interval(samples[signal.name]),
        "auroc_below": below if known and signal is not reference else None,
    }


def _within_questions(
    signal: Signal, correct: Bools, question: Ints, average: Floats, resamples: int
) -> dict[str, Any]:
    best = best_of_n(signal.values, correct, question)
    found = {
        "pair_accuracy": pair_accuracy(signal.values, correct, question),
        "best_of_n": best,
        "best_of_n_gain": best - average,
    }
    means = {name: mean(values) for name, values in found.items()}
    return means | {f"{name}_interval": mean_interval(v, resamples=resamples) for name, v in found.items()}


def _selective(signal: Signal, correct: Bools) -> dict[str, Any]:
    accuracies = selective_accuracy(signal.values, correct)
    kept = {coverage: max(1, round(coverage * len(accuracies))) for coverage in COVERAGES}
    return {
        "risk_area": risk_area(accuracies),
        "selective_accuracy": {str(coverage): float(accuracies[k - 1]) for coverage, k in kept.items()},
    }
