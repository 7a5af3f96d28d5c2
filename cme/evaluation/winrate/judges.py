"""What every judge can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cme.evaluation.winrate.cache import Failure


@dataclass(frozen=True)
class Reply:
    """What a judge returned. Exactly one of `answer` and `failure` is None; `error` is the failure in words.

    `cut_off`: the answer ended because it had reached its greatest length.
    """

    answer: str | None
    failure: Failure | None = None
    error: str | None = None
    cut_off: bool = False
    probabilities: dict[str, float] | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    seconds: float = 0.0
    attempts: int = field(default=1)


class Judge(Protocol):
    """Attributes:
    name: for people.
    identity: all that a verdict depends on, besides the text that is asked. No secrets.
    """

    name: str
    identity: Mapping[str, Any]

    def ask(self, texts: Sequence[str], record: Callable[[int, Reply], None]) -> None:
        """Call `record` with the number of a text and the reply to it, as replies come, maybe from other threads.

        What `record` raises ends the asking. Raises CMEError if no answer is to be hoped for.
        """
