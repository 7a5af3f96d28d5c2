"""One run of `cme eval text`."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cme.errors import CMEError, DatasetError
from cme.evaluation.generate import Loaded, rendered, sample
from cme.evaluation.report import Table, bounds, decimal, draw_intervals, picture, write_json, write_json_lines
from cme.evaluation.text import metrics
from cme.evaluation.text.divergence import likelihood_metrics, policy_of
from cme.evaluation.text.metrics import Change, Means, Response, Side
from cme.evaluation.text.options import Options
from cme.files.atomic import locked_folder, write_text
from cme.files.records import all_records
from cme.files.tables import Row, is_table
from cme.models import load_model
from cme.policy import Policy
from cme.tasks.registry import find_task
from cme.text.messages import Messages, text_of


def run(options: Options) -> str:
    """Compare two sides, write the folder, and return the table. Raises CMEError."""
    names = {"a": options.a, "b": options.b}
    if options.prompts is None and not all(map(is_table, names.values())):
        raise CMEError("--prompts is missing: a model needs prompts to respond to (a task's name or a file)")
    options.generation.check()
    prompts = [] if options.prompts is None else load_prompts(options.prompts, options.limit)
    with locked_folder(options.output):
        if options.overwrite:
            shutil.rmtree(options.output / "journal", ignore_errors=True)
        load = functools.cache(lambda name: load_model(name, "generator", **options.models.kwargs()))
        sides: dict[str, Side] = {}
        policies: dict[str, Policy] = {}
        for side, name in names.items():
            if is_table(name):
                path = Path(name)
            else:
                path = _generate(side, prompts, functools.partial(load, name), options)
                policies[side] = policy_of(*load(name), options.generation)
            sides[side] = metrics.by_prompt(read_responses(path))
        a, b = sides["a"], sides["b"]
        metrics.check_prompts(a, b)
        means = {"a": metrics.text_metrics(a, b), "b": metrics.text_metrics(b, a)}
        notes = _add_likelihoods(means, sides, policies, prompts, options)
        return _write(metrics.compare(**means), metrics.byte_drift(a, b), len(a), notes, options)


def load_prompts(name: str, limit: int | None) -> list[str | Messages]:
    """A task's held-out questions, or a file's prompts. Raises DatasetError if one of these is empty."""
    if not is_table(name):
        return [question.prompt for question in find_task(name).load("held_out")[:limit]]
    prompts = [record.prompt or "" for record in all_records(Path(name), needs_responses=False)]
    for number, prompt in enumerate(prompts, 1):
        if not text_of(prompt).strip():
            raise DatasetError(f"row {number} of {name} has an empty prompt")
    return prompts[:limit]


def read_responses(path: Path) -> list[Response]:
    """The responses in a file. Raises DatasetError if it can't be read, or lacks one."""
    return [
        Response(text_of(example.prompt), text_of(example.response), _count(record.row), example.finished)
        for record in all_records(path)
        for example in record.examples
    ]


def _count(row: Row) -> int | None:
    """The tokens of a response that this package generated; other files may have anything in a column `tokens`."""
    tokens = row.get("tokens")
    return tokens if type(tokens) is int else None


def _generate(side: str, prompts: Sequence[str | Messages], load: Callable[[], Loaded], options: Options) -> Path:
    """The file of the model's responses."""
    found = sample(
        getattr(options, side),
        prompts,
        options.generation,
        options.models,
        options.output / "journal" / f"{side}.jsonl",
        load=load,
        title=f"responses of {side.upper()}",
        progress=options.progress,
    )
    asked = [prompt for prompt in prompts for _ in range(options.generation.samples)]
    path = options.output / f"responses_{side}.jsonl"
    rows = [
        {"prompt": prompt, "response": response.text, "finished": response.finished, "tokens": response.length}
        for prompt, response in zip(asked, found, strict=True)
    ]
    write_json_lines(path, rows)
    return path


def _add_likelihoods(
    means: Mapping[str, Means],
    sides: Mapping[str, Side],
    policies: Mapping[str, Policy],
    prompts: Sequence[str | Messages],
    options: Options,
) -> list[str]:
    """Add the entropy of each model, and the KL estimates if there are two; returns notes on them."""
    generation, notes = options.generation, []
    vocabularies = [policy.tokenizer.get_vocab() for policy in policies.values()]
    comparable = len(vocabularies) == 2 and vocabularies[0] == vocabularies[1]
    for side, policy in policies.items():
        texts, _ = rendered(prompts, policy.tokenizer, generation.template)
        asked = {text_of(prompt): text for prompt, text in zip(prompts, texts, strict=True)}
        start = policies["a"] if side == "b" and comparable else None
        means[side].update(likelihood_metrics(policy, start, asked, sides[side], generation.template))
    if comparable:
        notes += [
            "kl_k1 and kl_k3 estimate KL(B || A) in nats per token, on B's responses without the end of the turn"
        ]
    elif len(policies) == 2:
        notes += ["no KL divergence: the models have different tokenizers"]
    if policies and (generation.greedy or generation.top_p < 1):
        chosen = "greedy" if generation.greedy else f"sampled with top-p {generation.top_p:g}"
        notes += [f"responses are {chosen}, entropy and KL of the whole distributions: the estimates are biased"]
    return notes


def _write(
    changes: Sequence[Change], drift: Mapping[str, Any], prompts: int, notes: Sequence[str], options: Options
) -> str:
    """text.json, text.png and text.md; returns the last one's text."""
    rows = [
        (c.metric, decimal(c.a), decimal(c.b), decimal(c.difference, "+"), _interval(c.interval_95, "+"))
        for c in changes
    ]
    lines = [
        f"A: {options.a}  \nB: {options.b}  \n{prompts} prompts; intervals are 95 %, over prompts\n",
        Table(("metric", "A", "B", "B - A", "interval"), rows).markdown(),
        f"\nbyte drift {decimal(drift['value'])} bits {_interval(drift['interval_95'])}; between two halves of A "
        f"{decimal(drift['halves_of_a'])}",
        *notes,
    ]
    text = "\n".join(lines) + "\n"
    shown = {
        change.metric: (change.difference, change.interval_95)
        for change in changes
        if change.metric.endswith("rate") or change.metric.startswith("distinct")
    }
    with picture(options.output / "text.png", 8, 1 + 0.4 * len(shown)) as figure:
        axes = figure.subplots()
        draw_intervals(axes, shown, reference=0)
        axes.set_xlabel("B - A, 95 % interval over prompts")
    write_text(options.output / "text.md", text)
    settings = {
        **{name: getattr(options, name) for name in ("a", "b", "prompts", "limit")},
        **options.generation.settings(),
        "dtype": options.models.dtype,
        "prompts_compared": prompts,
    }
    result = {"settings": settings, "metrics": [asdict(c) for c in changes], "byte_drift": drift, "notes": notes}
    write_json(options.output / "text.json", result)
    return text


def _interval(interval: Sequence[float] | None, sign: str = "") -> str:
    return "" if interval is None else bounds(interval, sign)
