"""One run of `cme eval winrate`: responses (read or generated) -> calls of the judge -> verdicts -> numbers.

responses/       what models that are no files answered
journal/         what an interrupted run resumes from
verdicts.jsonl   every call of the judge
annotations.json what AlpacaEval reads
winrate.json  winrate.md  winrate.png
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cme.errors import CMEError, DatasetError
from cme.evaluation.report import versions, write_json_lines
from cme.evaluation.winrate.calls import ask, calls_for, outcomes_of
from cme.evaluation.winrate.judges import Judge, Reply
from cme.evaluation.winrate.options import Options
from cme.evaluation.winrate.outcomes import summarize
from cme.evaluation.winrate.pairs import (
    Contestant,
    Entry,
    Prompt,
    annotations_of,
    by_key,
    prompts_of,
    read,
    read_annotations,
)
from cme.evaluation.winrate.report import Report, write
from cme.evaluation.winrate.verdict import JudgePrompt
from cme.files.atomic import locked_folder
from cme.files.tables import FORMATS


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
    assert options.output is not None
    template = JudgePrompt.read(options.judge_prompt)
    sides = _sides(options.contestants)
    with locked_folder(options.output):
        asked, contestants = _responses(sides, options)
        prompts = _answered_by_all(asked, contestants, options)
        pairs = list(itertools.combinations(contestants, 2))
        calls = calls_for(prompts, pairs, template, judge)
        replies = ask(
            calls,
            judge,
            options.output / "verdicts.jsonl",
            max_failures=options.max_failures,
            retry_unparsable=options.retry_unparsable,
            progress=options.progress,
        )
        outcomes = [outcomes_of(prompts, pair, calls, replies) for pair in pairs]
        report = Report(
            comparisons={f"{a.name} vs {b.name}": summarize(o) for (a, b), o in zip(pairs, outcomes, strict=True)},
            calls=_count(len({call.key for call in calls}), list(replies.values()), options),
            settings={"judge": {**judge.identity, "judge_prompt_sha256": template.sha256}, **options.settings()},
            versions=versions(),
        )
        by_pair = (annotations_of(prompts, o, *p, judge.name) for p, o in zip(pairs, outcomes, strict=True))
        write(report, options.output, list(itertools.chain(*by_pair)))
    if not report.reliable:
        raise TooManyFailures(_explain(report, replies, options), report)
    return report


def recompute(path: Path, output: Path | None) -> Report:
    """The win rates in a file of AlpacaEval's annotations, written to `output` if it is given."""
    report = Report(
        comparisons={f"{a} vs {b}": summarize(outcomes) for (a, b), outcomes in read_annotations(path).items()},
        settings={"annotations": str(path)},
        versions=versions(),
    )
    if output is not None:
        with locked_folder(output):
            write(report, output)
    return report


@dataclass(frozen=True)
class _Side:
    """A contestant before it has answered: a model, or a file, which has `entries`."""

    name: str
    model: str
    entries: Sequence[Entry] | None


def _sides(values: Sequence[str]) -> list[_Side]:
    """Contestants of one name are told apart by the whole of what they were called."""
    sides = [_side(value) for value in values]
    count = Counter(side.name for side in sides)
    sides = [replace(side, name=side.model) if count[side.name] > 1 else side for side in sides]
    for name, times in Counter(side.name for side in sides).items():
        if times > 1:
            raise CMEError(
                f"two contestants are called {name!r}: give them names, as in before={name} after={name}"
            )
    return sides


def _side(value: str) -> _Side:
    match = re.fullmatch(r"([\w.-]+)=(.+)", value)
    name, model = (match[1], match[2]) if match and not Path(value).exists() else (None, value)
    path = Path(model)
    if path.suffix.lower() not in FORMATS:
        return _Side(name or (path.resolve().name if path.is_dir() else path.name), model, None)
    entries = read(path)
    generators = {entry.generator for entry in entries}
    return _Side(name or (len(generators) == 1 and generators.pop()) or path.stem, model, entries)


def _responses(sides: Sequence[_Side], options: Options) -> tuple[list[Prompt], list[Contestant]]:
    """The prompts, and everybody's responses to them, which belong together by ids if every row has one, else by
    the texts of the prompts."""
    given = [] if options.prompts is None else [read(options.prompts, responses=False)]
    files = [*given, *(side.entries for side in sides if side.entries is not None)]
    if not files:
        raise CMEError("there are no prompts: name a file of them with --prompts")
    by_id = all(entry.id is not None for entries in files for entry in entries)
    keyed = [by_key(entries, by_id) for entries in files]
    prompts = prompts_of(keyed)
    prompts = prompts[: len(keyed[0])] if given else prompts
    prompts = prompts[: options.limit]
    contestants = [
        Contestant(side.name, generated_responses(side.name, side.model, prompts, options))
        if side.entries is None
        else Contestant(side.name, {key: e.response or "" for key, e in by_key(side.entries, by_id).items()})
        for side in sides
    ]
    return prompts, contestants


def generated_responses(name: str, model: str, prompts: Sequence[Prompt], options: Options) -> dict[str, str]:
    """A model's responses by the prompts' ids, also written to `options.output`/responses/NAME.jsonl.

    Those that are generated already are in `options.output`/journal, in a file per model, set of prompts and way
    to generate. Raises ModelError if the model can't be loaded, DatasetError if a prompt is too long for it.
    """
    from cme.evaluation.generate import identity, sample  # brings torch

    assert options.output is not None
    ids, texts = [prompt.id for prompt in prompts], [prompt.prompt for prompt in prompts]
    key = json.dumps([identity(model, texts, options.generation, options.models), ids], sort_keys=True)
    file_name = re.sub(r"[^\w.-]", "_", name)
    found = sample(
        model,
        texts,
        options.generation,
        options.models,
        options.output / "journal" / f"{file_name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.jsonl",
        ids=ids,
        title=f"responses of {name}",
        progress=options.progress,
    )
    responses = {prompt.id: response.text.strip() for prompt, response in zip(prompts, found, strict=True)}
    rows = [
        {"id": p.id, "prompt": p.prompt, "response": responses[p.id], "finished": response.finished}
        for p, response in zip(prompts, found, strict=True)
    ]
    (options.output / "responses").mkdir(exist_ok=True)
    write_json_lines(options.output / "responses" / f"{file_name}.jsonl", rows)
    return responses


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
        left_out = len(prompts) - len(common)
        print(f"{left_out} of {len(prompts)} prompts are left out: not all answered", file=sys.stderr)
    return common


def _count(num_calls: int, replies: Sequence[Reply], options: Options) -> dict[str, Any]:
    failures = Counter(reply.failure for reply in replies if reply.failure is not None)
    masses = [sum(reply.probabilities.values()) for reply in replies if reply.probabilities]
    return {
        "calls": num_calls,
        "failed": sum(failures.values()) + num_calls - len(replies),
        "failed_by_kind": {**failures, "not_asked": num_calls - len(replies)},
        "max_failures": options.max_failures,
        "attempts": sum(reply.attempts for reply in replies),
        "prompt_tokens": sum(reply.prompt_tokens or 0 for reply in replies),
        "completion_tokens": sum(reply.completion_tokens or 0 for reply in replies),
        "answers_without_token_counts": sum(
            reply.answer is not None and reply.prompt_tokens is None for reply in replies
        ),
        "mean_label_probability": sum(masses) / len(masses) if masses else None,
    }


_REMEDIES = {
    "unreachable": "The same command asks these again.",
    "refused": "The same command asks these again.",
    "unparsable": "Read them in verdicts.jsonl. Ask them again with --retry-unparsable; give a reasoning judge "
    "more tokens with --judge-option max_tokens=8192; or ask in other words with --judge-prompt.",
}


def _explain(report: Report, replies: Mapping[str, Reply], options: Options) -> str:
    calls = report.calls
    text = [
        f"{calls['failed']} of {calls['calls']} calls of the judge failed, which is more than the "
        f"{100 * options.max_failures:g} % that --max-failures allows. The results in {options.output} are of the "
        "other pairs, and not to be relied on."
    ]
    for kind, remedy in _REMEDIES.items():
        failed = [reply for reply in replies.values() if reply.failure == kind]
        if failed:
            answer = "" if failed[0].answer is None else f": {failed[0].answer[:200]!r}"
            text.append(f"{len(failed)} {kind}, such as: {failed[0].error}{answer}. {remedy}")
    if calls["failed_by_kind"]["not_asked"]:
        text.append(f"{calls['failed_by_kind']['not_asked']} not asked any more.")
    return "\n".join(text)
