"""A model's answers to held-out prompts, and what they say when taken together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from statistics import fmean
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cme.diagnostics import diagnose
from cme.evaluation.generate import Generated, Sampling, generate, seeded
from cme.evaluation.statistics import Interval, mean_interval
from cme.text.messages import Messages, text_of
from cme.verifier import Verifier


@dataclass(frozen=True)
class Answer:
    """One response to one held-out prompt.

    Attributes:
        question: number of the prompt.
        greedy: decoded greedily, not sampled.
        reward: mean log-likelihood under the verifier, nats per token; None if it can't be scored.
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
    autocast: AbstractContextManager[Any] | None = None,
) -> list[Answer]:
    """`sampling.samples` sampled answers and a greedy one to every row's `prompt`, scored.

    Random numbers are the same at every call and the caller's generator is left as it was, so that an evaluation
    changes nothing in the training around it.

    Args:
        verifier_prompts: what the verifier reads in place of each row's `prompt`.
        judge: whether a response to a row is right.
        progress: title of a progress bar; None for no bar.
        autocast: for the model, not for the verifier.
    """
    seen = [row["prompt"] for row in rows] if verifier_prompts is None else verifier_prompts
    drafts: list[tuple[int, bool, Generated]] = []
    total = len(rows) * (1 + sampling.samples)
    bar = tqdm(total=total, desc=f"{progress}: answers", unit=" answers", disable=progress is None)
    with bar, seeded(sampling.seed, model), autocast or nullcontext():
        for greedy, copies in ((True, 1), (False, sampling.samples)):
            questions = [i for i in range(len(rows)) for _ in range(copies)]
            prompts = [rows[i]["prompt"] for i in questions]
            responses = generate(model, tokenizer, prompts, sampling, greedy=greedy, bar=bar)
            drafts += [(i, greedy, response) for i, response in zip(questions, responses, strict=True)]
    scores = verifier.score(
        [seen[i] for i, *_ in drafts], [r.text for *_, r in drafts], progress=progress is not None
    )
    return [
        Answer(
            question=i,
            greedy=greedy,
            response=response.text,
            reward=score.mean_logprob,
            length=response.length,
            finished=response.finished,
            correct=None if judge is None else judge(response.text, rows[i]),
            **diagnose(text_of(seen[i]), response.text),
        )
        for (i, greedy, response), score in zip(drafts, scores, strict=True)
    ]


METRICS: dict[str, Callable[[Answer], float | None]] = {
    "reward": attrgetter("reward"),
    "accuracy_sampled": attrgetter("correct"),
    "accuracy_greedy": attrgetter("correct"),
    "mean_length": attrgetter("length"),
    "finished_rate": attrgetter("finished"),
    "repeated_4gram_rate": attrgetter("repeated_4gram_rate"),
    "prompt_copy_rate": attrgetter("prompt_copy_rate"),
    "echo_rate": attrgetter("echo_rate"),
}
"""The value of a response. All but `accuracy_greedy` are of sampled ones."""


def metric_by_question(answers: Sequence[Answer], metric: str) -> dict[int, float]:
    """The mean of a metric of `METRICS` for each question that has a value."""
    values: dict[int, list[float]] = defaultdict(list)
    for answer in answers:
        value = METRICS[metric](answer)
        if value is not None and answer.greedy == (metric == "accuracy_greedy"):
            values[answer.question].append(float(value))
    return {question: fmean(some) for question, some in values.items()}


def summarize(answers: Sequence[Answer]) -> dict[str, float | None]:
    """The mean over questions of every metric; None where nothing was measured."""
    found = {metric: metric_by_question(answers, metric).values() for metric in METRICS}
    return {metric: fmean(values) if values else None for metric, values in found.items()}


@dataclass(frozen=True)
class Change:
    """A metric before and after, over the questions that have it both times, and the change's 95 % interval."""

    before: float
    after: float
    interval: Interval
    questions: int


def change(before: Sequence[Answer], after: Sequence[Answer], metric: str) -> Change | None:
    """Paired by question; None if no question has the metric both times."""
    a, b = metric_by_question(before, metric), metric_by_question(after, metric)
    common = sorted(a.keys() & b.keys())
    interval = mean_interval([b[q] - a[q] for q in common])
    if interval is None:
        return None
    return Change(fmean(a[q] for q in common), fmean(b[q] for q in common), interval, len(common))


def to_dicts(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(a) for a in answers]
