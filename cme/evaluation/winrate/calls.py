"""Pairs of responses -> calls of the judge, in both orders -> verdicts."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

from cme.evaluation.winrate.cache import Line, VerdictCache
from cme.evaluation.winrate.inputs import Prompt
from cme.evaluation.winrate.judges import Judge, Reply
from cme.evaluation.winrate.outcomes import FIRST_SHARE, Outcome, share_of
from cme.evaluation.winrate.template import JudgePrompt
from cme.evaluation.winrate.verdict import parse

PATIENCE = 10
"""Failures that a run sees before it gives up, if they are too many: a dead server costs no thousand timeouts."""


_NO_VERDICT = "the answer holds no verdict, or several that differ"


@dataclass(frozen=True)
class Contestant:
    """A model by its name, and its responses by the prompts' ids."""

    name: str
    responses: Mapping[str, str]


@dataclass(frozen=True)
class Call:
    """One order of one pair."""

    key: str
    id: str
    first: str
    second: str
    text: str


class _EnoughFailures(Exception):
    pass


def calls_for(
    prompts: Sequence[Prompt], pairs: Sequence[tuple[Contestant, Contestant]], template: JudgePrompt, judge: Judge
) -> list[Call]:
    """Both orders of every pair; none for identical responses, which are a tie by definition."""
    return [
        _call(prompt, first, second, template, judge)
        for pair in pairs
        for prompt in prompts
        for first, second in (pair, pair[::-1])
        if first.responses[prompt.id] != second.responses[prompt.id]
    ]


def ask(
    calls: Sequence[Call],
    judge: Judge,
    template: JudgePrompt,
    cache: VerdictCache,
    *,
    max_failures: float,
    retry_unparsable: bool = False,
    progress: bool = True,
) -> dict[str, Line]:
    """The line of each call's key, from the cache or from the judge. Calls after too many failures have none.

    Args:
        max_failures: share of the calls.
        retry_unparsable: don't take answers without a verdict from the cache. Calls that got no answer are always
            made again.
    """
    unique = {call.key: call for call in calls}
    kept = {key: _read_again(line, unique[key]) for key, line in cache.open().items() if key in unique}
    lines = {key: line for key, line in kept.items() if _counts(line, retry_unparsable)}
    waiting = [call for key, call in unique.items() if key not in lines]
    lock = threading.Lock()
    failures = sum(line.failure is not None for line in lines.values())
    with tqdm(total=len(unique), initial=len(lines), desc="judging", unit=" calls", disable=not progress) as bar:

        def record(index: int, reply: Reply) -> None:
            nonlocal failures
            line = _line(waiting[index], reply, template)
            cache.append(line)
            with lock:
                lines[line.key] = line
                failures += line.failure is not None
                bar.set_postfix_str(f"{failures} failed" if failures else "", refresh=False)
                bar.update()
                if failures > max(max_failures * len(unique), PATIENCE):
                    raise _EnoughFailures

        try:
            if waiting:
                judge.ask([call.text for call in waiting], record)
        except _EnoughFailures:
            pass
    return lines


def outcomes_of(
    prompts: Sequence[Prompt],
    pair: tuple[Contestant, Contestant],
    calls: Sequence[Call],
    lines: Mapping[str, Line],
    weighted: bool = False,
) -> list[Outcome]:
    """What became of each prompt in the comparison of a pair. `weighted` counts probabilities, not verdicts."""
    keys = {(call.id, call.first, call.second): call.key for call in calls}
    a, b = pair

    def outcome(prompt: Prompt) -> Outcome:
        lengths = len(a.responses[prompt.id]), len(b.responses[prompt.id])
        if a.responses[prompt.id] == b.responses[prompt.id]:
            return Outcome(0.5, *lengths, identical=True)
        found = [lines.get(keys[prompt.id, x.name, y.name]) for x, y in (pair, pair[::-1])]
        shown_first, shown_second = (line.verdict if line else None for line in found)
        share = share_of(*(_first_share(line, weighted) for line in found))
        return Outcome(share, *lengths, (shown_first, shown_second))

    return [outcome(prompt) for prompt in prompts]


def _call(prompt: Prompt, first: Contestant, second: Contestant, template: JudgePrompt, judge: Judge) -> Call:
    text = template.render(prompt.prompt, first.responses[prompt.id], second.responses[prompt.id])
    parts = json.dumps([dict(judge.identity), template.sha256, text], sort_keys=True)
    return Call(hashlib.sha256(parts.encode()).hexdigest(), prompt.id, first.name, second.name, text)


def _first_share(line: Line | None, weighted: bool) -> float | None:
    """How much of the win goes to the response that was shown first."""
    if line is None or line.verdict is None:
        return None
    if not weighted or line.probabilities is None:
        return FIRST_SHARE[line.verdict]
    first, second, tie = (line.probabilities[label] for label in ("1", "2", "tie"))
    return (first + tie / 2) / (first + second + tie)


def _counts(line: Line, retry_unparsable: bool) -> bool:
    return line.failure is None or (line.failure == "unparsable" and not retry_unparsable)


def _read_again(line: Line, call: Call) -> Line:
    """A verdict is what its answer says by today's rules, not by those of the version that wrote the line."""
    if line.answer is None or line.verdict is None:
        return line
    verdict = parse(line.answer, asked=call.text)
    if verdict is None:
        return replace(line, verdict=None, failure="unparsable", error=_NO_VERDICT)
    return replace(line, verdict=verdict)


def _line(call: Call, reply: Reply, template: JudgePrompt) -> Line:
    verdict = None if reply.answer is None else parse(reply.answer, reply.cut_off, call.text)
    failure, error = reply.failure, reply.error
    if reply.answer is not None and verdict is None:
        failure, error = "unparsable", _NO_VERDICT
        if reply.cut_off:
            error = "the answer was cut off at its greatest length: allow more, --judge-option max_tokens=N"
    return Line(
        key=call.key,
        judge_prompt=template.sha256,
        id=call.id,
        first=call.first,
        second=call.second,
        answer=reply.answer,
        verdict=verdict,
        failure=failure,
        error=error,
        probabilities=reply.probabilities,
        prompt_tokens=reply.prompt_tokens,
        completion_tokens=reply.completion_tokens,
        seconds=round(reply.seconds, 3),
        attempts=reply.attempts,
        time=round(time.time(), 3),
    )
