"""The scores of all responses under one model, kept on disk as they come."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cme.evaluation.correctness.data import Response, identity_of
from cme.evaluation.correctness.options import Options
from cme.files.partial import Chunk, Partial
from cme.fingerprint import fingerprint
from cme.scores import SIGNAL_STATS, SIGNALS, ResponseScore
from cme.verifier import Verifier

CHUNK = 256
"""Responses that are scored, and that an interruption loses, at once."""

Score = dict[str, Any]
"""SIGNALS by name, the same of the answer alone as `answer_…`, and `unscorable`, a reason or None."""


def score_responses(
    responses: Sequence[Response],
    load: Callable[[], Verifier],
    identity: dict[str, Any],
    options: Options,
    path: Path,
    *,
    as_asked: bool = False,
) -> list[Score]:
    """One score a response, in order, kept in `path`; the model is loaded only if some are missing.

    Args:
        identity: what tells this run's model from others.
        as_asked: given the prompt of the generator instead of the verifier's.

    Raises:
        CMEError: `path` holds scores of other responses or of another model.
    """
    text = json.dumps(identity_of(responses), sort_keys=True, default=str)
    header: dict[str, Any] = {**identity, "sha256": hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()}
    partial = Partial(path)
    partial.check(header)
    done = sum(len(chunk.rows) for chunk in partial.chunks())
    if done < len(responses):
        verifier = load().at(partial.began)
        header["model"] = fingerprint(verifier)
        partial.check(header)
        done = partial.start(header)
        with tqdm(
            total=len(responses),
            initial=done,
            desc=f"scoring: {path.stem}",
            unit=" responses",
            disable=not options.progress,
        ) as bar:
            for start in range(done, len(responses), CHUNK):
                part = responses[start : start + CHUNK]
                partial.append(Chunk(_score(part, verifier, as_asked)))
                bar.update(len(part))
    return [row for chunk in partial.chunks() for row in chunk.rows if isinstance(row, dict)]


def _score(responses: Sequence[Response], verifier: Verifier, as_asked: bool) -> list[Any]:
    scores = verifier.score(
        [r.asked if as_asked else r.prompt for r in responses],
        [r.text for r in responses],
        stats=SIGNAL_STATS,
        token_spans=any(r.span for r in responses),
    )
    return [_values(response, score) for response, score in zip(responses, scores, strict=True)]


def _values(response: Response, score: ResponseScore) -> Score:
    """Where no answer was found, the answer is the whole response: its absence must not tell more to some signals
    than to others."""
    answer = score if response.span is None or score.tokens is None else score.within(*response.span)
    if answer.tokens is None:
        answer = score
    values: Score = {name: getattr(score, name) for name in SIGNALS}
    values |= {f"answer_{name}": getattr(answer, name) for name in SIGNALS}
    unscorable = response.problem or score.unscorable
    if unscorable is None and not all(math.isfinite(value) for value in values.values()):
        unscorable = "a signal is not finite"
    if unscorable is not None:
        values = dict.fromkeys(values)
    return {**values, "unscorable": unscorable}
