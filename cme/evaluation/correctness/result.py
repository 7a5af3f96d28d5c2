"""All numbers of a run, ready for JSON: what is undefined is null, with a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from cme.evaluation.correctness.calibration import calibrate
from cme.evaluation.correctness.data import Response
from cme.evaluation.correctness.metrics import (
    Bools,
    Floats,
    Ints,
    auroc,
    best_of_n,
    mean_and_oracle,
    pair_accuracy,
    risk_area,
    selective_accuracy,
)
from cme.evaluation.correctness.signals import ANSWER_HEADLINE, HEADLINE, Signal
from cme.evaluation.statistics import mean_interval, percentile_interval, resample

COVERAGES = tuple(round(0.05 * i, 2) for i in range(1, 21))
MIN_QUESTIONS = 10
"""With a right response, and with a wrong one, for a bootstrap over questions to mean something."""


def evaluate(
    responses: Sequence[Response], signals: Sequence[Signal], resamples: int, seed: int, progress: bool = False
) -> dict[str, Any]:
    """Counts, baselines, what is undefined, and every metric of every signal, by its name."""
    correct = np.array([r.correct for r in responses])
    ids = {name: i for i, name in enumerate(dict.fromkeys(r.question for r in responses))}
    question = np.array([ids[r.question] for r in responses])
    areas = _area_samples(signals, correct, question, resamples, progress)
    mean, oracle = mean_and_oracle(correct, question)
    return {
        "counts": _counts(correct, question),
        "baselines": {
            "mean_accuracy": _mean(mean),
            "oracle_accuracy": _mean(oracle),
            "risk_area_of_chance": float(1 - correct.mean()),
            "risk_area_of_oracle": risk_area(selective_accuracy(correct.astype(np.float64), correct)),
        },
        "undefined": undefined(correct, question),
        "signals": {
            signal.name: {
                "control": signal.control,
                "sign": signal.sign,
                "auroc": _number(auroc(signal.values, correct)[0]),
                "auroc_interval": percentile_interval(areas[signal.name]),
                "auroc_below": _difference(areas, signal, signals, correct),
                **_within_questions(signal, correct, question, mean, resamples),
                **_selective(signal, correct),
                "calibration": _calibration(signal, correct, question, seed),
            }
            for signal in signals
        },
    }


def undefined(correct: Bools, question: Ints) -> list[str]:
    """What can't be said of these labels, and why."""
    reasons = []
    counts = _counts(correct, question)
    if correct.all() or not correct.any():
        labels = "right" if correct.all() else "wrong"
        reasons.append(
            f"AUROC, pair accuracy and calibration are undefined: all {len(correct)} responses are {labels}"
        )
    elif counts["questions_with_right_and_wrong"] == 0:
        reasons.append("pair accuracy is undefined: no question has both right and wrong responses")
    single = counts["questions_with_one_response"]
    if single == counts["questions"]:
        reasons.append("best of N is undefined: no question has more than one response")
    elif single:
        reasons.append(f"best of N leaves out {single} questions with one response")
    few = min(counts["questions_with_right"], counts["questions_with_wrong"])
    if 0 < few < MIN_QUESTIONS:
        label = "right" if few == counts["questions_with_right"] else "wrong"
        reasons.append(f"intervals are not to be trusted: only {few} questions have a {label} response")
    return reasons


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


def _difference(
    areas: dict[str, Floats], signal: Signal, signals: Sequence[Signal], correct: Bools
) -> dict[str, Any] | None:
    """How far the signal's AUROC is below that of the verifier's likelihood of the same part of the response."""
    reference = next(s for s in signals if s.name == (ANSWER_HEADLINE if signal.of_answer else HEADLINE))
    difference = _number(auroc(reference.values, correct)[0] - auroc(signal.values, correct)[0])
    if signal.name == reference.name or difference is None:
        return None
    interval = percentile_interval(areas[reference.name] - areas[signal.name])
    return {"reference": reference.name, "difference": difference, "interval": interval}


def _within_questions(
    signal: Signal, correct: Bools, question: Ints, mean: Floats, resamples: int
) -> dict[str, Any]:
    pairs = pair_accuracy(signal.values, correct, question)
    best = best_of_n(signal.values, correct, question)
    return {
        "pair_accuracy": _mean(pairs),
        "pair_accuracy_interval": mean_interval(pairs.tolist(), resamples=resamples),
        "best_of_n": _mean(best),
        "best_of_n_interval": mean_interval(best.tolist(), resamples=resamples),
        "best_of_n_gain": _mean(best - mean),
        "best_of_n_gain_interval": mean_interval((best - mean).tolist(), resamples=resamples),
    }


def _selective(signal: Signal, correct: Bools) -> dict[str, Any]:
    accuracies = selective_accuracy(signal.values, correct)
    kept = [max(1, round(coverage * len(accuracies))) for coverage in COVERAGES]
    return {
        "risk_area": risk_area(accuracies),
        "selective_accuracy": {
            str(coverage): float(accuracies[k - 1]) for coverage, k in zip(COVERAGES, kept, strict=True)
        },
    }


def _calibration(signal: Signal, correct: Bools, question: Ints, seed: int) -> dict[str, Any] | None:
    found = calibrate(signal.values, correct, question, seed)
    if found is None:
        return None
    return {
        "ece": found.ece,
        "brier": found.brier,
        "brier_of_base_rate": found.brier_base_rate,
        "brier_skill": found.skill,
        "reliability": [
            {"probability": p, "accuracy": accuracy, "responses": count} for p, accuracy, count in found.bins
        ],
    }


def _mean(values: Floats) -> float | None:
    return float(values.mean()) if len(values) else None


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)
