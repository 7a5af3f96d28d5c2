"""What a judge's answer says: which of the two responses that it was shown is better. Never a guess."""

from __future__ import annotations

import re
from typing import Literal

Verdict = Literal["first", "second", "tie"]

_LABELS: dict[str, Verdict] = {
    "1": "first",
    "a": "first",
    "2": "second",
    "b": "second",
    "tie": "tie",
    "c": "tie",
}
_LABEL = r"(?:(?:response|answer|assistant)\s+)?([12abc]|tie)"
_ENDED_LINE = re.compile(rf"\W*verdict\W*\s*{_LABEL}\W*", re.IGNORECASE)
_BRACKETS = re.compile(rf"\[\[{_LABEL}\]\]", re.IGNORECASE)  # as MT-bench asks for it
_ALONE = re.compile(rf"\W*{_LABEL}\W*", re.IGNORECASE)
_THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL | re.IGNORECASE)


def parse(answer: str, cut_off: bool = False) -> Verdict | None:
    """The verdict in an answer: from a line `Verdict: 1`, `2` or `tie`, or `[[A]]`, or from an answer that is
    nothing but a label, whatever its case and punctuation. A and B (and C, a tie) may stand for 1 and 2.

    None if there is no verdict, or if there are several that differ. Thoughts in <think> tags don't count. Of an
    answer that was cut off only a bare label counts: what did not come may have taken a verdict back.
    """
    text = _THOUGHTS.sub("", answer)
    labels: list[str] = []
    if not cut_off:
        labels = [m[1] for line in text.splitlines() if (m := _ENDED_LINE.fullmatch(line))]
        labels += _BRACKETS.findall(text)
    if not labels and (match := _ALONE.fullmatch(text.strip())):
        labels = [match[1]]
    found = {_LABELS[label.casefold()] for label in labels}
    return found.pop() if len(found) == 1 else None
