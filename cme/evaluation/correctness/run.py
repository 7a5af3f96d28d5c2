"""One run of `cme eval correctness`: responses, their scores under every model, and what these say."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cme.errors import DatasetError
from cme.evaluation.correctness.data import Data, judged, load_data
from cme.evaluation.correctness.options import Options
from cme.evaluation.correctness.report import draw, markdown
from cme.evaluation.correctness.signals import SIGNS, Response, Score, evaluate, signals_of
from cme.evaluation.generate import read_rows, sample
from cme.evaluation.report import versions, write_json, write_json_lines
from cme.files.atomic import locked_folder, write_text
from cme.files.partial import Partial
from cme.fingerprint import fingerprint
from cme.models import model_files
from cme.scores import SIGNAL_STATS, ResponseScore
from cme.verifier import Verifier, random_verifier

CHUNK = 256
"""Responses that are scored, and that an interruption loses, at once."""

_NUMBERS = (*SIGNS, "num_tokens")
_KINDS = {
    **{f"{part}{name}": float | int | None for part in ("", "answer_") for name in _NUMBERS},
    "unscorable": str | None,
}


def run(options: Options) -> dict[str, Any]:
    """Evaluate, or continue what an interrupted run with the same options has left, and write the files.

    Returns what is in correctness.json. Raises CMEError, which says what to do.
    """
    options.generation.check()
    data = load_data(options)
    folder = options.output
    journal = folder / "journal"  # what is finished: sampled responses, and scores by model
    with locked_folder(folder):
        if options.overwrite:
            shutil.rmtree(journal, ignore_errors=True)
            (folder / "correctness.json").unlink(missing_ok=True)
        journal.mkdir(exist_ok=True)
        responses = _sampled(data, options, journal) if data.questions else data.responses
        scores = {
            name: _score_all(responses, model, options, journal / f"{name}.jsonl")
            for name, model in scorers(options).items()
        }
        result = _result(data, responses, scores, options)
        write_json_lines(folder / "responses.jsonl", _with_scores(responses, scores))
        write_text(folder / "correctness.md", markdown(result))
        draw(result, folder / "correctness.png")
        write_json(folder / "correctness.json", result)  # last: that it is there says that the run is finished
    return result


def _sampled(data: Data, options: Options, journal: Path) -> list[Response]:
    """The generator's responses to each question, judged."""
    assert options.generator is not None
    assert data.matcher is not None
    found = sample(
        options.generator,
        [question.prompt for question in data.questions],
        options.generation,
        options.models,
        journal / "responses.jsonl",
        ids=[question.id for question in data.questions],
        title="sampling",
        progress=options.progress,
    )
    drafts = [question for question in data.questions for _ in range(options.generation.samples)]
    return [
        judged(q, r.text, data.matcher, q.full_text, q.prompt, r.finished)
        for q, r in zip(drafts, found, strict=True)
    ]


@dataclass(frozen=True)
class Scorer:
    """A model whose scores of the responses are signals.

    Attributes:
        identity: what tells it from others before it is loaded.
        load: called if any scores are missing.
        as_asked: responses are given the generator's prompt, not the verifier's.
    """

    identity: Mapping[str, Any]
    load: Callable[[], Verifier]
    as_asked: bool = False


def scorers(options: Options) -> dict[str, Scorer]:
    """The verifier, and the models that are its controls."""
    shared: dict[str, Any] = {"max_batch_tokens": options.max_batch_tokens, **options.models.kwargs()}

    def scorer(role: str, name: str, template: str, variables: Mapping[str, Any], as_asked: bool) -> Scorer:
        how: dict[str, Any] = {"template": template, "chat_template_kwargs": dict(variables)}
        # A finished run loads no model, so its files have to tell that another one is called `name` by now
        identity = {role: name, f"{role}_files": model_files(name), **how}
        if role == "generator":
            del identity["template"]  # it is always the same, and runs of earlier versions do not name it
        identity |= {each: shared[each] for each in ("dtype", "max_batch_tokens")}

        def load() -> Verifier:
            return Verifier.from_pretrained(name, **how, **shared)

        # Random verifiers are made of the verifier, which is kept for them
        return Scorer(identity, functools.cache(load) if role == "verifier" else load, as_asked)

    verifier = scorer(
        "verifier", options.verifier, options.template, options.verifier_chat_template_kwargs, as_asked=False
    )
    found = {"verifier": verifier}
    if options.generator is not None:
        variables = options.generation.chat_template_kwargs
        found["generator"] = scorer("generator", options.generator, "auto", variables, as_asked=True)
    for i in range(options.random_verifiers):
        seed = options.generation.seed + i
        load = functools.partial(lambda seed: random_verifier(verifier.load(), seed), seed)
        found[f"random-{i}"] = Scorer({**verifier.identity, "seed": seed}, load)
    return found


def _score_all(responses: Sequence[Response], model: Scorer, options: Options, path: Path) -> list[Score]:
    """One score per response, in order, kept in `path`.

    Raises CMEError if `path` holds scores of other responses or of another model.
    """
    scored = [{"prompt": r.prompt, "asked": r.asked, "text": r.text, "span": r.span} for r in responses]
    text = json.dumps(scored, sort_keys=True, default=str)
    header = {**model.identity, "sha256": hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()}
    partial = Partial(path)
    partial.check(header)
    done = sum(1 for _ in partial.rows())
    if done < len(responses):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a model is scored unpacked changes no score
            verifier = model.load().at(partial.began)
        header["model"] = fingerprint(verifier)
        partial.check(header)
        done = partial.start(header)
        bar = tqdm(total=len(responses), initial=done, desc=f"scoring: {path.stem}", disable=not options.progress)
        with bar:
            for start in range(done, len(responses), CHUNK):
                part = responses[start : start + CHUNK]
                partial.append(_score(part, verifier, model.as_asked))
                bar.update(len(part))
    return read_rows(partial, _KINDS, len(responses))


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
    values: Score = {name: getattr(score, name) for name in _NUMBERS}
    values |= {f"answer_{name}": getattr(answer, name) for name in _NUMBERS}
    unscorable = response.problem or score.unscorable
    if unscorable is None and not all(math.isfinite(value) for value in values.values()):
        unscorable = "a signal is not finite"
    if unscorable is not None:
        values = dict.fromkeys(values)
    return {**values, "unscorable": unscorable}


def _result(
    data: Data, responses: Sequence[Response], scores: Mapping[str, Sequence[Score]], options: Options
) -> dict[str, Any]:
    # The first model's reason: a response that one model can't score is left out for all
    reasons = [
        next((score["unscorable"] for score in each if score["unscorable"] is not None), None)
        for each in zip(*scores.values(), strict=True)
    ]
    kept = [i for i, reason in enumerate(reasons) if reason is None]
    left_out = Counter(reason for reason in reasons if reason is not None)
    if not kept:
        raise DatasetError(
            f"none of the {len(responses)} responses could be scored: "
            + "; ".join(f"{reason} ({count})" for reason, count in left_out.most_common(3))
        )
    sound = [responses[i] for i in kept]
    signals = signals_of(sound, {name: [each[i] for i in kept] for name, each in scores.items()})
    return {
        "about": data.about,
        "settings": options.settings(),
        "versions": versions(*([data.package] if data.package else [])),
        "left_out": dict(left_out.most_common()),
        "malformed": data.malformed,
        "answers_found": sum(r.span is not None for r in sound) / len(sound),
        **evaluate(sound, signals, options.resamples, options.generation.seed, options.progress),
    }


def _with_scores(responses: Sequence[Response], scores: Mapping[str, Sequence[Score]]) -> list[dict[str, Any]]:
    """For each response the numbers of all models, as they gave them."""
    return [
        vars(response)
        | {f"{model}/{name}": v for model, score in zip(scores, each, strict=True) for name, v in score.items()}
        for response, *each in zip(responses, *scores.values(), strict=True)
    ]
