"""What a judge's answer says: which of the two responses that it was shown is better. Never a guess."""

from __future__ import annotations

import re
from typing import Literal

from cme.text.messages import THOUGHT_TAG, hide_thoughts

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
_NAMED = r"\b(?:[12]|(?-i:[ABC])|tie)\b"  # "a" is a word, too
_NOTE = rf"[^\w?(]*\((?:(?!{_NAMED}|\b(?:not?|or)\b)[^()?]|\b\1\b)*\)"  # which names no other label
_END = r"(?:</s>|<\|\w+\|>|[^\w?])*"  # a question is no verdict
_ALONE = re.compile(rf"[^\w>]*{_LABEL}{_END}", re.IGNORECASE)
_MINE = r"""[^\w>\n"'“‘«]*(?:(?:so|thus|therefore|my|the|final|overall)\W+)*verdict"""
_LINE = re.compile(rf"{_MINE}(?:\s+is)?[^\w?!≠]+{_LABEL}(?:{_NOTE})?{_END}", re.IGNORECASE)
_HEADING = re.compile(rf"^({_MINE})[^\w\n]*\n\s*([^\w>\n\"'“‘«]*{_LABEL}[^\w?\n]*)$", re.IGNORECASE | re.MULTILINE)
_BRACKETS = re.compile(rf"(?:(?!\[\[).)*\[\[{_LABEL}\]\]{_END}", re.IGNORECASE)  # as MT-bench asks for it
# Of a certain verdict, of none, or of another's: not "to reach a verdict", nor "my verdict:" alone
_SPEAKS = re.compile(
    rf"verdict(?:\s+is\b|\W{{0,9}}[:=])\W{{0,9}}\w|verdict\b.*{_NAMED}|\[\[\W{{0,9}}{_LABEL}\b|\ba\s+verdict\W*:"
    r"|(?:\b(?:no|not|cannot|never|neither|its|their|own)\b|n['’]t\b).*verdict"
    r"|^\W*(?:(?:so|my|the|overall)\W+)*"
    rf"(?:final|winner|decision|choice|preference|conclusion|better|best)\b[^:]*:\W*{_LABEL}\W*$",
    re.IGNORECASE,
)
_REVISES = re.compile(
    rf"(?:^|[:=]|\b(?:change|wait|reflection|correction|instead)\b.*?\b)\W*{_LABEL}{_END}$"
    rf"|\b(?:response\s+)?([12abc])\s+(?:is|was)\s+(?:(?!not?\b)\w+\s+)?better\b",
    re.IGNORECASE,
)


def parse(answer: str, cut_off: bool = False, asked: str = "") -> Verdict | None:
    """The verdict in an answer: from a line `Verdict: 1`, `2` or `tie`, or one that ends with `[[A]]`, or from an
    answer that is nothing but a label, whatever its case and punctuation. A and B (and C, a tie) may stand for 1
    and 2.

    None if it is not certain. A judge may quote what a response says, so the verdict has to stand on the first or
    the last line, every line that speaks of a certain verdict has to say the same, and no later line may prefer
    another ("No, 2 is better"); lines after `>` are quotations. Thoughts don't count. Of an answer that was cut
    off only a bare label counts: what did not come may have taken a verdict back.

    Args:
        asked: what the judge was shown.
    """
    text = _without_thoughts(answer, asked)
    if text is None:
        return None
    if alone := _ALONE.fullmatch(text):
        return _LABELS.get(alone[1].casefold())
    text = _HEADING.sub(r"\1: \2", text)
    lines = [line for line in text.splitlines() if re.search(r"\w", line) and not line.lstrip().startswith(">")]
    said = {i: _said(line) for i, line in enumerate(lines) if _said(line) or _SPEAKS.search(line)}
    if cut_off or said.keys().isdisjoint((0, len(lines) - 1)) or len(set(said.values())) != 1:
        return None
    first, verdict = next(iter(said.items()))
    return verdict if _preferred(lines[first + 1 :]) <= {verdict} else None


def _said(line: str) -> Verdict | None:
    match = _LINE.fullmatch(line) or _BRACKETS.fullmatch(line)
    return _LABELS.get(match[1].casefold()) if match else None


def _preferred(lines: list[str]) -> set[Verdict | None]:
    found = (match for line in lines if not _said(line) for match in _REVISES.finditer(line))
    return {_LABELS.get((match[1] or match[2]).casefold()) for match in found}


def _without_thoughts(answer: str, asked: str) -> str | None:
    """Where the judge was shown such tags, those in its answer may be quotations, which must not hide its own
    verdict: then only one pair counts, with which the answer begins."""
    tags = list(THOUGHT_TAG.finditer(answer))
    begins = len(tags) == 2 and not answer[: tags[0].start()].strip() and "/" not in tags[0][0]
    return hide_thoughts(answer) if begins or not THOUGHT_TAG.search(asked) else answer
