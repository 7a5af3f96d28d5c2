"""A model's answers to held-out prompts, and what they say when taken together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cme.evaluation.text import diagnose
from cme.rendering import Messages, encode_prompt, text_of
from cme.verifier import Verifier

METRICS = (
    "reward",
    "accuracy_sampled",
    "accuracy_greedy",
    "mean_length",
    "finished_rate",
    "repeated_4gram_rate",
    "prompt_copy_rate",
    "echo_rate",
)


@dataclass(frozen=True)
class Answer:
    """One response to one held-out prompt.

    Attributes:
        question: number of the prompt.
        greedy: decoded greedily, not sampled.
        reward: mean log-likelihood under the verifier, nats a token; None if it can't be scored.
        length: tokens of the generator, the end-of-turn token included.
        finished: ended by itself within the length limit.
        correct: None where nothing tells right from wrong.
    """

    question: int
    greedy: bool
    response: str
    reward: float | None
    length: int
    finished: bool
    correct: bool | None
    repeated_4gram_rate: float
    prompt_copy_rate: float
    echo_rate: float

    def of_question(self, question: int) -> Answer:
        """The same answer under another number."""
        return replace(self, question=question)


@dataclass(frozen=True)
class Sampling:
    """How to sample: completions a prompt, and the settings of `generate`."""

    samples: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 64
    seed: int = 0

    def generate_options(self, greedy: bool) -> dict[str, Any]:
        if greedy:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


def answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    verifier: Verifier,
    rows: Sequence[Mapping[str, Any]],
    sampling: Sampling,
    *,
    verifier_prompts: Sequence[str | Messages] | None = None,
    judge: Callable[[str, Mapping[str, Any]], bool] | None = None,
    progress: str | None = None,
) -> list[Answer]:
    """`sampling.samples` sampled answers and a greedy one to every row's `prompt`, scored.

    Random numbers are the same at every call and the caller's generator is left as it was, so that an evaluation
    changes nothing in the training around it. `progress` is the title of a progress bar; None for no bar.
    """
    seen = [row["prompt"] for row in rows] if verifier_prompts is None else verifier_prompts
    drafts: list[tuple[int, bool, str, int, bool]] = []
    devices = [model.device] if model.device.type == "cuda" else []
    total = len(rows) * (1 + sampling.samples)
    bar = tqdm(total=total, desc=f"{progress}: answers", unit=" answers", disable=progress is None)
    with bar, torch.random.fork_rng(devices=devices):
        torch.manual_seed(sampling.seed)
        for greedy, copies in ((True, 1), (False, sampling.samples)):
            questions = [i for i in range(len(rows)) for _ in range(copies)]
            for start in range(0, len(questions), sampling.batch_size):
                part = questions[start : start + sampling.batch_size]
                texts = _generate(model, tokenizer, [rows[i]["prompt"] for i in part], sampling, greedy)
                drafts += [(i, greedy, *text) for i, text in zip(part, texts, strict=True)]
                bar.update(len(part))
    scores = verifier.score(
        [seen[i] for i, *_ in drafts], [text for _, _, text, _, _ in drafts], progress=progress is not None
    )
    return [
        Answer(
            question=i,
            greedy=greedy,
            response=text,
            reward=score.mean_logprob,
            length=length,
            finished=finished,
            correct=None if judge is None else judge(text, rows[i]),
            **diagnose(text_of(seen[i]), text),
        )
        for (i, greedy, text, length, finished), score in zip(drafts, scores, strict=True)
    ]


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    sampling: Sampling,
    greedy: bool,
) -> list[tuple[str, int, bool]]:
    """Text, length in tokens and whether it ended by itself, for each prompt."""
    padded: Any = {"input_ids": [encode_prompt(tokenizer, p) for p in prompts]}
    inputs = tokenizer.pad(padded, padding_side="left", return_tensors="pt").to(model.device)
    with torch.no_grad():
        out = model.generate(  # type: ignore[operator]
            **inputs,
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **sampling.generate_options(greedy),
        )
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    results = []
    for tokens in out[:, inputs["input_ids"].shape[1] :].tolist():
        end = next((j for j, token in enumerate(tokens) if token in ends), None)
        kept = tokens if end is None else tokens[: end + 1]
        results.append((str(tokenizer.decode(kept, skip_special_tokens=True)), len(kept), end is not None))
    return results


def metric_by_question(answers: Sequence[Answer], metric: str) -> dict[int, float]:
    """The mean of a metric of `METRICS` for each question that has a value."""
    values: dict[int, list[float]] = {}
    for answer in answers:
        if answer.greedy != (metric == "accuracy_greedy"):
            continue
        value = {
            "accuracy_sampled": answer.correct,
            "accuracy_greedy": answer.correct,
            "mean_length": answer.length,
            "finished_rate": answer.finished,
        }.get(metric, getattr(answer, metric, None))
        if value is not None:
            values.setdefault(answer.question, []).append(float(value))
    return {question: sum(v) / len(v) for question, v in values.items()}


def summarize(answers: Sequence[Answer]) -> dict[str, float | None]:
    """The mean over questions of every metric; None where nothing was measured. All but `accuracy_greedy` are over
    sampled answers."""
    means: dict[str, float | None] = {}
    for metric in METRICS:
        values = metric_by_question(answers, metric)
        means[metric] = sum(values.values()) / len(values) if values else None
    return means


def difference_interval(
    before: Sequence[Answer], after: Sequence[Answer], metric: str, level: float = 0.95, resamples: int = 10_000
) -> tuple[float, float] | None:
    """Bootstrap percentile interval of the change of a metric's mean, resampling questions (paired)."""
    a, b = metric_by_question(before, metric), metric_by_question(after, metric)
    common = sorted(a.keys() & b.keys())
    if not common:
        return None
    change = np.array([b[q] - a[q] for q in common])
    draws = np.random.default_rng(0).integers(len(change), size=(resamples, len(change)))
    low, high = np.quantile(change[draws].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def to_dicts(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(a) for a in answers]
