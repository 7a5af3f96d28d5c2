"""One run of `cme eval winrate`.

responses/       what models that are no files answered
journal/         what an interrupted run goes on from
verdicts.jsonl   every call of the judge
annotations.json what AlpacaEval reads
winrate.json  winrate.md  winrate.png
"""

from __future__ import annotations

import importlib.metadata
import itertools
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cme.errors import CMEError, DatasetError
from cme.evaluation.winrate.annotations import read as read_annotations
from cme.evaluation.winrate.annotations import to_entries
from cme.evaluation.winrate.cache import Line, VerdictCache
from cme.evaluation.winrate.calls import Contestant, ask, calls_for, outcomes_of
from cme.evaluation.winrate.inputs import Prompt, Source, is_file, prompts_of, read, responses_to
from cme.evaluation.winrate.judges import Judge
from cme.evaluation.winrate.options import Options
from cme.evaluation.winrate.outcomes import summarize
from cme.evaluation.winrate.report import Report, write
from cme.evaluation.winrate.template import JudgePrompt
from cme.files.atomic import locked_folder


class TooManyFailures(CMEError):
    """More calls failed than are allowed. What there is has been written; `report` holds it."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


def compare(options: Options, judge: Judge) -> Report:
    """Get the responses, have them judged, write the results to `options.output`.

    Raises:
        TooManyFailures: after everything is written.
        CMEError: something is wrong with the input, a model or the judge.
    """
    template = JudgePrompt.read(options.judge_prompt)
    inputs = _read(options)
    with locked_folder(options.output):
        contestants = [Contestant(entry.name, _responses(entry, inputs, options)) for entry in inputs.entries]
        prompts = _answered_by_all(inputs.prompts, contestants, options)
        pairs = list(itertools.combinations(contestants, 2))
        calls = calls_for(prompts, pairs, template, judge)
        lines = ask(
            calls,
            judge,
            template,
            VerdictCache(options.output / "verdicts.jsonl"),
            max_failures=options.max_failures,
            retry_unparsable=options.retry_unparsable,
            progress=options.progress,
        )
        outcomes = [outcomes_of(prompts, pair, calls, lines, options.weighted) for pair in pairs]
        num_calls = len({call.key for call in calls})
        report = Report(
            comparisons={f"{a.name} vs {b.name}": summarize(o) for (a, b), o in zip(pairs, outcomes, strict=True)},
            calls=_count(num_calls, list(lines.values()), options),
            settings={"judge": {**judge.identity, "judge_prompt_sha256": template.sha256}, **options.settings()},
            versions=versions(),
        )
        records = [
            entry
            for (a, b), o in zip(pairs, outcomes, strict=True)
            for entry in to_entries(prompts, o, (a.name, b.name), (a.responses, b.responses), judge.name)
        ]
        write(report, options.output, records)
    if report.calls["failed"] > options.max_failures * num_calls:
        raise TooManyFailures(_explain(report, lines, options), report)
    return report


def recompute(path: Path, output: Path | None) -> Report:
    """The win rates in a file of AlpacaEval's annotations, written to `output` if it is given."""
    outcomes = read_annotations(path)
    report = Report(
        comparisons={f"{a} vs {b}": summarize(values) for (a, b), values in outcomes.items()},
        settings={"annotations": str(path)},
        versions=versions(),
    )
    if output is not None:
        with locked_folder(output):
            write(report, output)
    return report


def versions() -> dict[str, str]:
    """Of what a result depends on."""
    return {name: importlib.metadata.version(name) for name in ("cme", "torch", "transformers", "numpy")}


@dataclass(frozen=True)
class _Entry:
    """A contestant before it has answered: a model, or a file (`source` is set)."""

    name: str
    model: str
    source: Source | None


@dataclass(frozen=True)
class _Inputs:
    """`by_id`: responses belong to prompts by their ids, not by the prompts' texts."""

    prompts: list[Prompt]
    entries: list[_Entry]
    by_id: bool


def _read(options: Options) -> _Inputs:
    entries = _name([_entry(value) for value in options.contestants])
    files = [entry.source for entry in entries if entry.source is not None]
    first = read(options.prompts) if options.prompts is not None else next(iter(files), None)
    if first is None:
        raise CMEError("there are no prompts: name a file of them with --prompts")
    by_id = all(source.has_ids for source in (first, *files))
    prompts = prompts_of(first, by_id)
    if options.prompts is None:
        for source in files:
            _check_same(prompts, prompts_of(source, by_id), first, source, options)
    return _Inputs(prompts[: options.limit], entries, by_id)


def _check_same(
    prompts: Sequence[Prompt], others: Sequence[Prompt], a: Source, b: Source, options: Options
) -> None:
    known = {prompt.id for prompt in prompts}
    extra = [prompt.id for prompt in others if prompt.id not in known]
    if extra and not options.only_common:
        raise DatasetError(
            f"{len(extra)} prompts of {b.path} are missing in {a.path}, the first is {extra[0][:80]!r}. "
            "Answer them, or leave them out with --only-common."
        )


def _entry(value: str) -> _Entry:
    match = re.fullmatch(r"([\w.-]+)=(.+)", value)
    name, model = (match[1], match[2]) if match and not Path(value).exists() else (None, value)
    source = read(Path(model)) if is_file(model) else None
    if name is None:
        path = Path(model)
        name = (source.generator or path.stem) if source else (path.resolve().name if path.is_dir() else path.name)
    return _Entry(name, model, source)


def _name(entries: Sequence[_Entry]) -> list[_Entry]:
    """Tell contestants of one name apart by the whole of what they were called."""
    count = Counter(entry.name for entry in entries)
    named = [_Entry(e.model, e.model, e.source) if count[e.name] > 1 else e for e in entries]
    names = [entry.name for entry in named]
    for name in names:
        if names.count(name) > 1:
            raise CMEError(
                f"two contestants are called {name!r}: give them names, as in before={name} after={name}"
            )
    return named


def _responses(entry: _Entry, inputs: _Inputs, options: Options) -> dict[str, str]:
    if entry.source is not None:
        return responses_to(inputs.prompts, entry.source, inputs.by_id)
    from cme.evaluation.winrate.generated import responses_of  # brings torch

    return responses_of(
        entry.name,
        entry.model,
        inputs.prompts,
        options.generation,
        options.model_options,
        options.output,
        options.progress,
    )


def _answered_by_all(
    prompts: Sequence[Prompt], contestants: Sequence[Contestant], options: Options
) -> list[Prompt]:
    for contestant in contestants:
        missing = [prompt.id for prompt in prompts if prompt.id not in contestant.responses]
        if missing and not options.only_common:
            raise DatasetError(
                f"{contestant.name} has no response to {len(missing)} of {len(prompts)} prompts, the first is "
                f"{missing[0][:80]!r}. Answer them, or leave them out with --only-common."
            )
    common = [prompt for prompt in prompts if all(prompt.id in c.responses for c in contestants)]
    if not common:
        raise DatasetError("no prompt has a response from everybody: the files are about different prompts")
    if len(common) < len(prompts):
        print(
            f"{len(prompts) - len(common)} of {len(prompts)} prompts are left out: not all answered",
            file=sys.stderr,
        )
    return common


def _count(num_calls: int, lines: Sequence[Line], options: Options) -> dict[str, Any]:
    failures = Counter(line.failure for line in lines if line.failure is not None)
    tokens = [sum(getattr(line, f"{kind}_tokens") or 0 for line in lines) for kind in ("prompt", "completion")]
    counted = sum(line.prompt_tokens is not None for line in lines)
    answered = sum(line.answer is not None for line in lines)
    masses = [sum(line.probabilities.values()) for line in lines if line.probabilities]
    return {
        "calls": num_calls,
        "failed": sum(failures.values()) + num_calls - len(lines),
        "failed_by_kind": {**failures, "not_asked": num_calls - len(lines)},
        "max_failures": options.max_failures,
        "attempts": sum(line.attempts for line in lines),
        "prompt_tokens": tokens[0],
        "completion_tokens": tokens[1],
        "answers_without_token_counts": answered - counted,
        "cost_usd": _cost(tokens, options) if counted == answered else None,
        "mean_label_probability": sum(masses) / len(masses) if masses else None,
    }


def _cost(tokens: Sequence[int], options: Options) -> float | None:
    if options.prices is None:
        return None
    return sum(count * price / 1e6 for count, price in zip(tokens, options.prices, strict=True))


_REMEDIES = {
    "unreachable": "The same command asks these again.",
    "refused": "The same command asks these again.",
    "unparsable": "Read them in verdicts.jsonl. Ask them again with --retry-unparsable; give a reasoning judge "
    "more tokens with --judge-option max_tokens=8192; or ask in other words with --judge-prompt.",
}


def _explain(report: Report, lines: Mapping[str, Line], options: Options) -> str:
    calls = report.calls
    text = [
        f"{calls['failed']} of {calls['calls']} calls of the judge failed, which is more than the "
        f"{100 * options.max_failures:g} % that --max-failures allows. The results in {options.output} are of the "
        "other pairs, and not to be relied on."
    ]
    for kind, remedy in _REMEDIES.items():
        failed = [line for line in lines.values() if line.failure == kind]
        if failed:
            example = (
                failed[0].error if failed[0].answer is None else f"{failed[0].error}: {failed[0].answer[:200]!r}"
            )
            text.append(f"{len(failed)} {kind}, such as: {example}. {remedy}")
    if calls["failed_by_kind"]["not_asked"]:
        text.append(f"{calls['failed_by_kind']['not_asked']} not asked any more.")
    return "\n".join(text)
