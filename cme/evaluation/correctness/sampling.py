"""A generator's responses, kept on disk as they come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cme.demo.models import local_path
from cme.evaluation.correctness.data import Response, answered
from cme.evaluation.correctness.models import Models
from cme.evaluation.correctness.options import Options
from cme.evaluation.fingerprint import fingerprint
from cme.evaluation.generate import Sampling, generate
from cme.rendering import PLAIN_TEMPLATE, Messages, text_of
from cme.score_file.partial import Chunk, Partial
from cme.tasks.matchers import Matcher
from cme.tasks.questions import Question

BATCH_SIZE = 64
"""Responses that are sampled together, with random numbers of their own: a run that goes on draws what one that
was not interrupted would have drawn."""


def sample_responses(
    questions: Sequence[Question], matcher: Matcher, models: Models, options: Options, path: Path
) -> list[Response]:
    """`options.samples` responses to each question, the questions in order, judged.

    They are kept in `path`. Raises CMEError if it holds responses that were sampled otherwise.
    """
    assert options.generator is not None
    drafts = [question for question in questions for _ in range(options.samples)]
    partial = Partial(path)
    header = {
        "generator": options.generator,
        "generator_files": fingerprint(local_path(options.generator)),
        "samples": options.samples,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "max_new_tokens": options.max_new_tokens,
        "seed": options.seed,
        "dtype": options.dtype,
        "questions": [[q.id, text_of(q.prompt)] for q in questions],
    }
    partial.check(header)
    done = partial.start(header)
    if done < len(drafts):
        _sample(drafts, done, models, options, partial)
    rows = [row for chunk in partial.chunks() for row in chunk.rows if isinstance(row, dict)]
    return [answered(q, row["text"], row["finished"], matcher) for q, row in zip(drafts, rows, strict=True)]


def _sample(drafts: Sequence[Question], done: int, models: Models, options: Options, partial: Partial) -> None:
    model, tokenizer = models.generator()
    sampling = Sampling(
        options.samples, options.max_new_tokens, options.temperature, options.top_p, batch_size=BATCH_SIZE
    )
    devices = [model.device] if model.device.type == "cuda" else []
    bar: tqdm[Any] = tqdm(
        total=len(drafts), initial=done, desc="sampling", unit=" responses", disable=not options.progress
    )
    with bar, torch.random.fork_rng(devices=devices):
        for start in range(done, len(drafts), BATCH_SIZE):
            part = drafts[start : start + BATCH_SIZE]
            prompts = [prompt_for(question, bool(tokenizer.chat_template)) for question in part]
            torch.manual_seed(options.seed * 1_000_003 + start)
            responses = generate(model, tokenizer, prompts, sampling, greedy=options.temperature == 0, bar=bar)
            partial.append(
                Chunk([{"text": r.text, "length": r.length, "finished": r.finished} for r in responses])
            )


def prompt_for(question: Question, chat: bool) -> str | Messages:
    """A generator without a chat template is asked as a verifier without one is shown a question."""
    if chat:
        return question.prompt
    return PLAIN_TEMPLATE.partition(" {response}")[0].replace("{prompt}", text_of(question.prompt))
