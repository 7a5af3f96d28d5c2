"""Every answer of the judge, on disk as soon as it is there: a run that was killed asks nothing twice, and anybody
can read what was decided and why.

One JSON object a line, only ever appended.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from cme.errors import CMEError
from cme.evaluation.winrate.verdict import Verdict

Failure = Literal["unreachable", "refused", "unparsable"]
"""No answer came; the judge declined this one request; there is no verdict in its answer."""


@dataclass(frozen=True)
class Line:
    """A call of the judge.

    Attributes:
        key: hash of the judge, its settings, and the whole text that it was sent.
        judge_prompt: SHA-256 of the template.
        id: of the prompt.
        first, second: the models whose responses were shown as first and second.
        answer: as it came; None if there is none.
        verdict: None, exactly where `failure` is not.
        error: the failure in words.
        probabilities: of the labels, from a local judge, relative to all text that could stand there.
        prompt_tokens, completion_tokens: as the judge reports them.
        seconds: with retries. attempts: 1 if there were none.
        time: Unix time of the answer.
    """

    key: str
    judge_prompt: str
    id: str
    first: str
    second: str
    answer: str | None
    verdict: Verdict | None
    failure: Failure | None
    error: str | None
    probabilities: dict[str, float] | None
    prompt_tokens: int | None
    completion_tokens: int | None
    seconds: float
    attempts: int
    time: float


class VerdictCache:
    """The file of verdicts; `append` may be called from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def open(self) -> dict[str, Line]:
        """Cut off a torn last line, and read the newest line of each key.

        Raises CMEError if another line is damaged.
        """
        if not self.path.exists():
            return {}
        with self.path.open("r+b") as file:
            data = file.read()
            file.truncate(data.rfind(b"\n") + 1)
        return {line.key: line for line in self._parse(data[: data.rfind(b"\n") + 1])}

    def append(self, line: Line) -> None:
        """Returns once the line is on the disk."""
        data = json.dumps(asdict(line), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with self._lock, self.path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def _parse(self, data: bytes) -> Iterator[Line]:
        for number, text in enumerate(data.splitlines(), 1):
            try:
                yield _line(json.loads(text))
            except (ValueError, TypeError, RecursionError) as error:
                raise CMEError(
                    f"line {number} of {self.path} is damaged ({error}): delete it; its call will be made again"
                ) from error


def token_count(value: Any) -> int | None:
    """What a judge says that it counted; None if that is no number of tokens."""
    return value if type(value) is int and 0 <= value < 2**53 else None


def _line(value: dict[str, Any]) -> Line:
    counts = {name: token_count(value.get(name)) for name in ("prompt_tokens", "completion_tokens")}
    line = Line(**{**value, **counts})
    if line.verdict not in (*get_args(Verdict), None) or line.failure not in (*get_args(Failure), None):
        raise ValueError(f"no such verdict or failure: {line.verdict!r}, {line.failure!r}")
    if (line.verdict is None) != (line.failure is not None):
        raise ValueError("it needs a verdict or a failure")
    if not isinstance(line.answer, str) and not (line.answer is None and line.failure is not None):
        raise ValueError("its answer is no text")
    if type(line.attempts) is not int:
        raise ValueError("its attempts are no number")
    return line
