"""One run of `cme eval correctness`."""

from __future__ import annotations

import json
import platform
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cme.errors import CMEError, DatasetError
from cme.evaluation.correctness.data import Data, Response
from cme.evaluation.correctness.models import Models
from cme.evaluation.correctness.options import Options
from cme.evaluation.correctness.picture import draw
from cme.evaluation.correctness.report import markdown
from cme.evaluation.correctness.result import evaluate
from cme.evaluation.correctness.sampling import sample_responses
from cme.evaluation.correctness.scores import Score, score_responses
from cme.evaluation.correctness.signals import signals_of
from cme.evaluation.correctness.source import load_data
from cme.files.atomic import locked_folder, write_text
from cme.fingerprint import model_files

JOURNAL = "journal"
"""Folder of what is finished of a run: sampled responses, and scores by model."""


def run(options: Options) -> dict[str, Any]:
    """Evaluate, or go on with what an interrupted run with the same options has left, and write the files.

    Returns what is in correctness.json. Raises CMEError, which says what to do.
    """
    _check(options)
    data = load_data(options)
    with _folder(options) as folder:
        models = Models(options)
        responses = data.responses
        if data.questions:
            assert data.matcher is not None
            path = folder / JOURNAL / "responses.jsonl"
            responses = sample_responses(data.questions, data.matcher, models, options, path)
        scores = _scores(responses, models, options, folder / JOURNAL)
        result = _result(data, responses, scores, options)
        write_text(folder / "responses.jsonl", _response_lines(responses, scores))
        write_text(folder / "correctness.md", markdown(result))
        draw(result, folder / "correctness.png")
        # Last, so that its presence says that the run is finished
        write_text(
            folder / "correctness.json", json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        )
    return result


def _check(options: Options) -> None:
    least = {
        "samples": (options.generation.samples, 1),
        "max-new-tokens": (options.generation.max_new_tokens, 1),
        "limit": (options.limit, 1),
        "random-verifiers": (options.random_verifiers, 0),
        "resamples": (options.resamples, 1),
        "max-batch-tokens": (options.max_batch_tokens, 1),
    }
    for name, (value, minimum) in least.items():
        if value is not None and value < minimum:
            raise CMEError(f"--{name} must be at least {minimum}, not {value}")
    options.generation.check()


def _scores(
    responses: Sequence[Response], models: Models, options: Options, folder: Path
) -> dict[str, list[Score]]:
    shared = {"dtype": options.models.dtype, "max_batch_tokens": options.max_batch_tokens}
    identity = {
        **_identity("verifier", options.verifier),
        "template": options.template,
        "chat_template_kwargs": dict(options.verifier_chat_template_kwargs),
        **shared,
    }

    def path(name: str) -> Path:
        return folder / f"{name}.jsonl"

    scores = {"verifier": score_responses(responses, lambda: models.verifier, identity, options, path("verifier"))}
    if options.generator is not None:
        scores["generator"] = score_responses(
            responses,
            models.generator_as_verifier,
            {
                **_identity("generator", options.generator),
                "chat_template_kwargs": dict(options.generation.chat_template_kwargs),
                **shared,
            },
            options,
            path("generator"),
            as_asked=True,
        )
    for i in range(options.random_verifiers):
        name, seed = f"random-{i}", options.generation.seed + i
        scores[name] = score_responses(
            responses,
            lambda seed=seed: models.random_verifier(seed),  # type: ignore[misc]
            {**identity, "seed": seed},
            options,
            path(name),
        )
    return scores


def _identity(role: str, name: str) -> dict[str, Any]:
    """A finished run loads no model, so its files have to tell that another one is called `name` by now."""
    return {role: name, f"{role}_files": model_files(name)}


def _result(
    data: Data, responses: Sequence[Response], scores: Mapping[str, Sequence[Score]], options: Options
) -> dict[str, Any]:
    reasons = [_why_unscorable(each) for each in zip(*scores.values(), strict=True)]
    kept = [i for i, reason in enumerate(reasons) if reason is None]
    left_out = Counter(reason for reason in reasons if reason is not None)
    if not kept:
        raise DatasetError(
            f"none of the {len(responses)} responses could be scored: "
            + "; ".join(f"{reason} ({count})" for reason, count in left_out.most_common(3))
        )
    sound = [responses[i] for i in kept]
    signals = signals_of(sound, {name: [each[i] for i in kept] for name, each in scores.items()}, data.sampled)
    return {
        "about": data.about,
        "settings": _settings(options),
        "versions": _versions(data.package),
        "left_out": dict(left_out.most_common()),
        "malformed": len(data.malformed),
        "answers_found": sum(r.span is not None for r in sound) / len(sound),
        **evaluate(sound, signals, options.resamples, options.generation.seed, options.progress),
    }


def _settings(options: Options) -> dict[str, Any]:
    left_out = ("output", "overwrite", "progress", "generation", "models")
    settings = {name: value for name, value in vars(options).items() if name not in left_out}
    settings |= {**options.models.kwargs(), "seed": options.generation.seed}
    return settings if options.generator is None else {**options.generation.settings(), **settings}


def _why_unscorable(scores: Sequence[Score]) -> str | None:
    """The first model's reason: a response that one model can't score is left out for all."""
    return next((score["unscorable"] for score in scores if score["unscorable"] is not None), None)


def _response_lines(responses: Sequence[Response], scores: Mapping[str, Sequence[Score]]) -> str:
    """A line a response with its raw signals, as the models gave them."""
    lines = []
    for response, *each in zip(responses, *scores.values(), strict=True):
        values = {
            f"{model}/{name}": value
            for model, score in zip(scores, each, strict=True)
            for name, value in score.items()
        }
        lines.append(json.dumps({**vars(response), **values}, default=str) + "\n")
    return "".join(lines)


def _versions(package: str | None) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("cme", "torch", "transformers", "numpy", *([package] if package else [])):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # a checkout that was not installed
            versions[name] = "not installed"
    return versions


@contextmanager
def _folder(options: Options) -> Iterator[Path]:
    """The output folder, with no other run in it."""
    folder = options.output
    with locked_folder(folder):
        if options.overwrite:
            shutil.rmtree(folder / JOURNAL, ignore_errors=True)
            (folder / "correctness.json").unlink(missing_ok=True)
        (folder / JOURNAL).mkdir(exist_ok=True)
        yield folder
