"""What a judge's answer says: which of the two responses that it was shown is better. Never a guess."""

from __future__ import annotations

import re
from typing import Literal

from cme.thoughts import TAG, hide_thoughts

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
_END = r"[^\w?]*"  # a question is no verdict
_ALONE = re.compile(rf"[^\w>]*{_LABEL}{_END}", re.IGNORECASE)
_LINE = re.compile(
    rf"""[^\w>"'“‘«]*(?:(?:so|thus|therefore|my|the|final|overall)\W+)*verdict(?:\s+is)?[^\w?!≠]+{_LABEL}{_END}""",
    re.IGNORECASE,
)
_BRACKETS = re.compile(rf"(?:(?!\[\[).)*\[\[{_LABEL}\]\]{_END}", re.IGNORECASE)  # as MT-bench asks for it
_SPEAKS = re.compile(
    r"verdict|\[\[|^\W*(?:(?:so|my|the|overall)\W+)*"
    rf"(?:final|winner|decision|choice|preference|conclusion|better|best)\b[^:]*:\W*{_LABEL}\W*$",
    re.IGNORECASE,
)


def parse(answer: str, cut_off: bool = False, asked: str = "") -> Verdict | None:
    """The verdict in an answer: from a line `Verdict: 1`, `2` or `tie`, or one that ends with `[[A]]`, or from an
    answer that is nothing but a label, whatever its case and punctuation. A and B (and C, a tie) may stand for 1
    and 2.

    None if it is not certain. A judge may quote what a response says, so the verdict has to stand on the first or
    the last line, and every line that speaks of a verdict has to say the same; lines after `>` are quotations.
    Thoughts don't count. Of an answer that was cut off only a bare label counts: what did not come may have taken
    a verdict back.

    Args:
        asked: what the judge was shown.
    """
    text = _without_thoughts(answer, asked)
    if text is None:
        return None
    if alone := _ALONE.fullmatch(text):
        return _LABELS.get(alone[1].casefold())
    lines = [line for line in text.splitlines() if re.search(r"\w", line) and not line.lstrip().startswith(">")]
    said = {i: _said(line) for i, line in enumerate(lines) if _SPEAKS.search(line)}
    if cut_off or said.keys().isdisjoint((0, len(lines) - 1)) or len(set(said.values())) != 1:
        return None
    return said.popitem()[1]


def _said(line: str) -> Verdict | None:
    match = _LINE.fullmatch(line) or _BRACKETS.fullmatch(line)
    return _LABELS.get(match[1].casefold()) if match else None


def _without_thoughts(answer: str, asked: str) -> str | None:
    """Where the judge was shown such tags, those in its answer may be quotations, which must not hide its own
    verdict: then only one pair counts, with which the answer begins."""
    tags = list(TAG.finditer(answer))
    begins = len(tags) == 2 and not answer[: tags[0].start()].strip() and "/" not in tags[0][0]
    return hide_thoughts(answer) if begins or not TAG.search(asked) else answer
