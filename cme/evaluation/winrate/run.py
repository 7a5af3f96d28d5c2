"""One run of `cme eval winrate`: responses (read or generated) -> calls of the judge -> verdicts -> numbers.

responses/       what models that are no files answered
journal/         what an interrupted run resumes from
verdicts.jsonl   every call of the judge
annotations.json what AlpacaEval reads
winrate.json  winrate.md  winrate.png
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cme.errors import CMEError, DatasetError
from cme.evaluation.report import versions
from cme.evaluation.statistics import mean
from cme.evaluation.winrate.calls import annotation_of, ask, calls_for
from cme.evaluation.winrate.inputs import contestants_of, with_responses
from cme.evaluation.winrate.judges import Judge, Reply
from cme.evaluation.winrate.options import Options
from cme.evaluation.winrate.outcomes import comparisons
from cme.evaluation.winrate.report import Report, write
from cme.evaluation.winrate.verdict import JudgePrompt
from cme.files.atomic import locked_folder
from cme.files.tables import Malformed, Row, Table, open_table


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
    contestants = contestants_of(options.contestants)
    with locked_folder(options.output):
        prompts, contestants = with_responses(contestants, options)
        pairs = list(itertools.combinations(contestants, 2))
        calls = calls_for(prompts, pairs, template, judge)
        replies = ask(calls, judge, options.output / "verdicts.jsonl", options)
        annotations = [
            annotation_of(prompt, pair, template, judge, replies) for pair in pairs for prompt in prompts
        ]
        report = Report(
            comparisons=comparisons(("an annotation", annotation) for annotation in annotations),
            calls=_count(len(calls), list(replies.values()), options),
            settings={"judge": {**judge.identity, "judge_prompt_sha256": template.sha256}, **options.settings()},
            versions=versions(),
        )
        write(report, options.output, annotations)
    if not report.reliable:
        raise TooManyFailures(_explain(report, replies, options), report)
    return report


def recompute(path: Path, output: Path | None) -> Report:
    """The win rates in a file of AlpacaEval's annotations, written to `output` if it is given."""
    report = Report(
        comparisons=comparisons((f"row {number} of {path}", row) for number, row in enumerate(_rows(path), 1)),
        settings={"annotations": str(path)},
        versions=versions(),
    )
    if output is not None:
        with locked_folder(output):
            write(report, output)
    return report


def _rows(path: Path) -> Iterator[Row]:
    """The rows of a file of annotations, in JSON also with NaN, as pandas and Python write what is missing.

    Raises DatasetError if it can't be read.
    """
    if path.suffix.lower() == ".json":
        with contextlib.suppress(OSError, ValueError, RecursionError):
            values = json.loads(path.read_bytes())
            if isinstance(values, list) and values and all(isinstance(value, dict) for value in values):
                return iter(values)
    table = open_table(path)  # says what is wrong
    return map(functools.partial(_intact, table), table.rows())


def _intact(table: Table, row: Row | Malformed) -> Row:
    if isinstance(row, Malformed):
        raise DatasetError(f"line {row.line} of {table.name} can't be read: {row.reason}")
    return row


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
        "mean_label_probability": mean(masses),
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
