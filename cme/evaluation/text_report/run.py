"""One run of `cme eval text`."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cme.errors import CMEError
from cme.evaluation.generate import Loaded, rendered, sample
from cme.evaluation.text_report import divergence, output, responses
from cme.evaluation.text_report.compare import byte_drift, check_pairs, common_counts, compare, text_metrics
from cme.evaluation.text_report.options import Options
from cme.evaluation.text_report.responses import Response
from cme.files.atomic import locked_folder, write_text
from cme.models import load_model
from cme.policy import Policy
from cme.text.rendering import text_of


def run(options: Options) -> str:
    """Compare two sides, write the folder, and return the table. Raises CMEError."""
    names = {"a": options.a, "b": options.b}
    if options.prompts is None and not all(map(responses.is_file, names.values())):
        raise CMEError(
            "--prompts is missing: a model needs prompts to respond to (a task's name, a file, or a hub id)"
        )
    options.generation.check()
    rows = [] if options.prompts is None else responses.load_rows(options.prompts, options.limit)
    load = functools.cache(lambda name: _load(name, options))
    with locked_folder(options.output):
        if options.overwrite:
            shutil.rmtree(options.output / "journal", ignore_errors=True)
        sides, policies = {}, {}
        for side, name in names.items():
            if responses.is_file(name):
                sides[side] = responses.read_file(name)
            else:
                sides[side] = _generated(side, name, rows, options, load)
                policies[side] = divergence.policy_of(*load(name), options.generation)
        check_pairs(sides["a"], sides["b"])
        counts = common_counts(sides["a"], sides["b"])
        metrics = {side: text_metrics(some, counts) for side, some in sides.items()}
        notes = _add_divergence(metrics, sides, policies, rows, options.generation.template)
        table = compare(metrics["a"], metrics["b"])
        return output.write(
            table, byte_drift(sides["a"], sides["b"]), _settings(options, sides), notes, options.output
        )


def _generated(
    side: str, name: str, rows: Sequence[Mapping[str, Any]], options: Options, load: Callable[[str], Loaded]
) -> list[Response]:
    prompts = [row["prompt"] for row in rows]
    found = sample(
        name,
        prompts,
        options.generation,
        options.models,
        options.output / "journal" / f"{side}.jsonl",
        load=lambda: load(name),
        title=f"responses of {side.upper()}",
        progress=options.progress,
    )
    texts = [text_of(prompt) for prompt in prompts for _ in range(options.generation.samples)]
    made = [Response(p, r.text, r.length, r.finished) for p, r in zip(texts, found, strict=True)]
    lines = (json.dumps(asdict(response), ensure_ascii=False) + "\n" for response in made)
    write_text(options.output / f"responses_{side}.jsonl", "".join(lines))
    return made


def _add_divergence(
    metrics: dict[str, Any],
    sides: Mapping[str, Sequence[Response]],
    policies: Mapping[str, Policy],
    rows: Sequence[Mapping[str, Any]],
    template: str,
) -> list[str]:
    """Entropy for each model, and the KL estimates for two; returns what there is to say about it."""
    asked: dict[str, divergence.Prompts] = {}
    for side, policy in policies.items():
        prompts = [row["prompt"] for row in rows]
        texts, _ = rendered(prompts, policy.tokenizer, template)
        asked[side] = {text_of(prompt): text for prompt, text in zip(prompts, texts, strict=True)}
        metrics[side]["entropy"] = divergence.entropy(policy, asked[side], sides[side], template)
    if len(policies) < 2:
        return []
    if not divergence.same_tokens(policies["a"].tokenizer, policies["b"].tokenizer):
        return ["no KL divergence: the models have different tokenizers"]
    metrics["b"] |= divergence.kl(policies["b"], policies["a"], asked["b"], sides["b"], template)
    return ["kl_k1 and kl_k3 estimate KL(B || A) in nats a token, on B's responses without the end of the turn"]


def _settings(options: Options, sides: Mapping[str, Sequence[Response]]) -> dict[str, Any]:
    return {
        "a": options.a,
        "b": options.b,
        "prompts": options.prompts,
        "limit": options.limit,
        **options.generation.settings(),
        "dtype": options.models.dtype,
        "prompts_compared": len({response.prompt for response in sides["a"]}),
    }


def _load(name: str, options: Options) -> Loaded:
    return load_model(name, "generator", **options.models.kwargs())
