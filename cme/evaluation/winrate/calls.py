"""Pairs of responses -> calls of the judge, in both orders -> verdicts, each on disk as soon as it is there."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from cme.errors import CMEError
from cme.evaluation.winrate.judges import Failure, Judge, Reply, token_count
from cme.evaluation.winrate.outcomes import Outcome, share_of
from cme.evaluation.winrate.pairs import Contestant, Prompt
from cme.evaluation.winrate.verdict import JudgePrompt
from cme.files.journal import Journal

PATIENCE = 10
"""Failures that a run sees before it gives up, if they are too many: a dead server costs no thousand timeouts."""


@dataclass(frozen=True)
class Call:
    """One order of one pair.

    Attributes:
        key: hash of the judge, its settings, and the text.
        judge_prompt: SHA-256 of the template.
        id: of the prompt.
        first, second: the models whose responses are shown as first and second.
        text: all that the judge is sent.
    """

    key: str
    judge_prompt: str
    id: str
    first: str
    second: str
    text: str


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


def _call(prompt: Prompt, first: Contestant, second: Contestant, template: JudgePrompt, judge: Judge) -> Call:
    text = template.render(prompt.prompt, first.responses[prompt.id], second.responses[prompt.id])
    parts = json.dumps([dict(judge.identity), template.sha256, text], sort_keys=True)
    key = hashlib.sha256(parts.encode()).hexdigest()
    return Call(key, template.sha256, prompt.id, first.name, second.name, text)


class _EnoughFailures(Exception):
    pass


def ask(
    calls: Sequence[Call],
    judge: Judge,
    path: Path,
    *,
    max_failures: float,
    retry_unparsable: bool = False,
    progress: bool = True,
) -> dict[str, Reply]:
    """The reply to each call by its key, from the file `path` or from the judge, which is then added to the file.
    Calls after too many failures have none.

    Args:
        max_failures: share of the calls.
        retry_unparsable: ask again where the file has an answer without a verdict. Calls that got no answer are
            always made again.
    """
    unique = {call.key: call for call in calls}
    settled = (None,) if retry_unparsable else (None, "unparsable")
    # A verdict is what its answer says by the rules of today, not by those of the version that wrote it
    known = {key: reply.judged(unique[key].text) for key, reply in _read(path).items() if key in unique}
    replies = {key: reply for key, reply in known.items() if reply.failure in settled}
    waiting = [call for key, call in unique.items() if key not in replies]
    failures = sum(reply.failure is not None for reply in replies.values())
    journal = Journal(path)
    with tqdm(total=len(unique), initial=len(replies), desc="judging", unit=" calls", disable=not progress) as bar:

        def record(index: int, reply: Reply) -> None:
            nonlocal failures
            call = waiting[index]
            replies[call.key] = judged = reply.judged(call.text)
            about = {name: value for name, value in asdict(call).items() if name != "text"}
            journal.append({**about, **asdict(judged), "time": round(time.time(), 3)})
            failures += judged.failure is not None
            bar.set_postfix_str(f"{failures} failed" if failures else "", refresh=False)
            bar.update()
            if failures > max(max_failures * len(unique), PATIENCE):
                raise _EnoughFailures

        try:
            if waiting:
                judge.ask([call.text for call in waiting], record)
        except _EnoughFailures:
            pass
    return replies


def _read(path: Path) -> dict[str, Reply]:
    """The newest reply to each call. Raises CMEError if a line has another kind of value than `record` writes."""
    replies = {}
    for number, line in enumerate(Journal(path), 1):
        try:
            replies[line["key"]] = _reply(line)
        except (ValueError, TypeError, KeyError) as error:
            raise CMEError(
                f"line {number} of {path} is damaged ({error}): delete it; its call will be made again"
            ) from error
    return replies


def _reply(line: Mapping[str, Any]) -> Reply:
    counts = {name: token_count(line[name]) for name in ("prompt_tokens", "completion_tokens")}
    reply = Reply(**{**{field.name: line[field.name] for field in fields(Reply)}, **counts})
    if not isinstance(reply.answer, str) and (reply.answer is not None or reply.failure not in get_args(Failure)):
        raise ValueError("it has neither an answer nor a failure")
    if type(reply.attempts) is not int:
        raise ValueError("its attempts are no number")
    return reply


def outcomes_of(
    prompts: Sequence[Prompt],
    pair: tuple[Contestant, Contestant],
    calls: Sequence[Call],
    replies: Mapping[str, Reply],
) -> list[Outcome]:
    """The outcome for each prompt in the comparison of a pair."""
    keys = {(call.id, call.first, call.second): call.key for call in calls}
    a, b = pair

    def outcome(prompt: Prompt) -> Outcome:
        lengths = len(a.responses[prompt.id]), len(b.responses[prompt.id])
        if a.responses[prompt.id] == b.responses[prompt.id]:
            return Outcome(0.5, *lengths, identical=True)
        found = [replies.get(keys[prompt.id, x.name, y.name]) for x, y in (pair, pair[::-1])]
        a_first, b_first = (reply.verdict if reply else None for reply in found)
        return Outcome(share_of(a_first, b_first), *lengths, (a_first, b_first))

    return [outcome(prompt) for prompt in prompts]
