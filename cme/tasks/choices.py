"""Which option of a multiple-choice question a response chooses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_STATED = (
    r"(?:\\boxed\{(?:\\\w+\{)?|<answer>|####|\b(?:[Aa]nswer|ANSWER|[Oo]ption|[Cc]hoice|[Ii]t)[*_\"]*"
    r"(?:\s+is\b|['’]s\b|\s*[:=]))(?:\W{0,40}[Oo]ption\b)?\W{0,40}"  # bounded: "####" is such a mark, too
)
_MARKED = r"(?:\((?=.\))|\b[Oo]ption\s+(?=.\b)|\b(?=.\s+is\s+(?:the\s+)?(?:correct|right)\b)|^[^\w\n]*(?=.[.):]))"


@dataclass(frozen=True)
class Choice:
    """The part [start, end) of a response, in characters, that names the option."""

    start: int
    end: int
    letter: str


def find_choice(response: str, choices: Sequence[str]) -> Choice | None:
    """The last option that is stated as the answer ("Answer: B", "it is (B)"); else the only one that fills a line
    ("B", "B. Paris"); else the only one that is marked as one ("(B)", "option B", "B is right"); else the only one
    whose text occurs. Where there are several, there is none. "Answer: B?" states none."""
    options = {letter: text.strip(" .") for letter, text in zip(LETTERS, choices, strict=False)}
    stated, fills_line, marked = _patterns(options)
    if found := list(stated.finditer(response)):
        return _lettered(found[-1])
    for pattern in (fills_line, marked):
        if found := list(pattern.finditer(response)):
            return _lettered(found[0]) if len({match[1] for match in found}) == 1 else None
    return _quoted(response, options)


def _patterns(options: Mapping[str, str]) -> list[re.Pattern[str]]:
    """How an option's letter, which is group 1, is stated as the answer, fills a line, and is marked."""
    letter = f"([{''.join(options)}])"
    texts = {key: re.escape(text) for key, text in options.items() if text}
    own_text = "|".join(rf"(?<={key})[^\w\n]+(?i:{text})(?![\w?])" for key, text in texts.items())
    listed = rf",\W*(?:(?:and|or)\W+)?[{''.join(options)}]\b"
    ended = rf"(?!{listed})[^\w\s.:;!?,<]*(?:[.:;!,<\n]|\s+(?:because|since|as)\b|\s*\Z)"
    patterns = (
        rf"{_STATED}{letter}\b(?:{own_text}|{ended})",
        rf"^[^\w\n]*{letter}(?:{own_text}|)[^\w\n]*$",
        _MARKED + letter,
    )
    return [re.compile(pattern, re.MULTILINE) for pattern in patterns]


def _lettered(match: re.Match[str]) -> Choice:
    return Choice(match.start(1), match.end(1), match[1])


def _quoted(response: str, options: Mapping[str, str]) -> Choice | None:
    """The only option whose text occurs, other than in the text of another ("acid" in "nucleic acid")."""
    found = [
        Choice(match.start(), match.end(), letter)
        for letter, text in options.items()
        if text and (match := re.search(rf"(?<!\w){re.escape(text)}(?!\w)", response, re.IGNORECASE))
    ]
    longest = [a for a in found if not any(a != b and b.start <= a.start and a.end <= b.end for b in found)]
    return longest[0] if len(longest) == 1 else None
