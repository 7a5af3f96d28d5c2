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
from cme.evaluation.winrate.inputs import Contestant, Prompt
from cme.evaluation.winrate.judges import CUT_OFF_ERROR, Failure, Judge, Reply, token_count
from cme.evaluation.winrate.options import Options
from cme.evaluation.winrate.outcomes import share_of
from cme.evaluation.winrate.verdict import JudgePrompt, Verdict, shown
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


Pair = tuple[Contestant, Contestant]
"""A, which is the model, and B, which is the reference."""


def call_of(prompt: Prompt, first: Contestant, second: Contestant, template: JudgePrompt, judge: Judge) -> Call:
    """The question which of two responses is better."""
    text = template.render(prompt.prompt, first.responses[prompt.id], second.responses[prompt.id])
    parts = json.dumps([dict(judge.identity), template.sha256, text], sort_keys=True)
    key = hashlib.sha256(parts.encode()).hexdigest()
    return Call(key, template.sha256, prompt.id, first.name, second.name, text)


def calls_for(
    prompts: Sequence[Prompt], pairs: Sequence[Pair], template: JudgePrompt, judge: Judge
) -> dict[str, Call]:
    """Both orders of every pair, by their keys; none for identical responses, which are a tie by definition."""
    calls = [
        call_of(prompt, first, second, template, judge)
        for pair in pairs
        for prompt in prompts
        for first, second in (pair, pair[::-1])
        if first.responses[prompt.id] != second.responses[prompt.id]
    ]
    return {call.key: call for call in calls}


class _EnoughFailures(Exception):
    pass


def ask(calls: Mapping[str, Call], judge: Judge, path: Path, options: Options) -> dict[str, Reply]:
    """The reply to each call by its key: from the file `path`, or from the judge, and then added to the file.

    Calls that got no answer are made again, and with `options.retry_unparsable` those whose answer has no verdict.
    Once more than `options.max_failures` of the calls have failed, the others are not made, and have no reply.
    """
    settled = (None,) if options.retry_unparsable else (None, "unparsable")
    # A verdict is what its answer says by the rules of today, not by those of the version that wrote it
    known = {key: reply.judged(calls[key].text) for key, reply in _read(path).items() if key in calls}
    replies = {key: reply for key, reply in known.items() if reply.failure in settled}
    waiting = [call for key, call in calls.items() if key not in replies]
    failures = sum(reply.failure is not None for reply in replies.values())
    journal = Journal(path)
    with tqdm(
        total=len(calls), initial=len(replies), desc="judging", unit=" calls", disable=not options.progress
    ) as bar:

        def record(index: int, reply: Reply) -> None:
            nonlocal failures
            call = waiting[index]
            replies[call.key] = judged = reply.judged(call.text)
            about = {name: value for name, value in asdict(call).items() if name != "text"}
            journal.append({**about, **asdict(judged), "time": round(time.time(), 3)})
            failures += judged.failure is not None
            bar.set_postfix_str(f"{failures} failed" if failures else "", refresh=False)
            bar.update()
            if failures > max(options.max_failures * len(calls), PATIENCE):
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
            what = f"it has no {error}" if isinstance(error, KeyError) else error
            raise CMEError(
                f"line {number} of {path} is damaged ({what}): delete it; its call will be made again"
            ) from error
    return replies


def _reply(line: Mapping[str, Any]) -> Reply:
    # Lines of earlier versions say only in `error` that an answer was cut off
    line = {"cut_off": line["error"] == CUT_OFF_ERROR, **line}
    counts = {name: token_count(line[name]) for name in ("prompt_tokens", "completion_tokens")}
    reply = Reply(**{**{field.name: line[field.name] for field in fields(Reply)}, **counts})
    if not isinstance(reply.answer, str) and (reply.answer is not None or reply.failure not in get_args(Failure)):
        raise ValueError("it has neither an answer nor a failure")
    if type(reply.attempts) is not int:
        raise ValueError("its attempts are no number")
    if not isinstance(reply.probabilities, dict | None):
        raise ValueError("its probabilities are none")
    return reply


def annotation_of(
    prompt: Prompt, pair: Pair, template: JudgePrompt, judge: Judge, replies: Mapping[str, Reply]
) -> dict[str, Any]:
    """The verdicts on a pair of responses as AlpacaEval writes them; see `outcomes.Outcome.of`."""

    def verdict(first: Contestant, second: Contestant) -> Verdict | None:
        reply = replies.get(call_of(prompt, first, second, template, judge).key)
        return None if reply is None else reply.verdict

    a, b = pair
    a_first, b_first = verdict(a, b), verdict(b, a)
    identical = a.responses[prompt.id] == b.responses[prompt.id]
    share = 0.5 if identical else share_of(a_first, b_first)
    return {
        "id": prompt.id,
        "dataset": prompt.dataset,
        "instruction": shown(prompt.prompt),
        "generator_1": b.name,
        "output_1": b.responses[prompt.id],
        "generator_2": a.name,
        "output_2": a.responses[prompt.id],
        "annotator": judge.name,
        "preference": None if share is None else 1 + share,
        "verdict_model_shown_first": a_first,
        "verdict_reference_shown_first": b_first,
    }
