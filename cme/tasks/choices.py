"""The option of a multiple-choice question that a response chooses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from cme.tasks.questions import LETTERS, Answer

# "Answer:", "the answer is", "it's option", "\boxed{\text{", "####"
_STATED = (
    r"(?:\\boxed\{(?:\\\w+\{)?|<answer>|####|\b(?:[Aa]nswer|ANSWER|[Oo]ption|[Cc]hoice|[Ii]t)[*_\"]*"
    r"(?:\s+is\b|['’]s\b|\s*[:=]))(?:\W{0,40}[Oo]ption\b)?\W{0,40}"  # bounded: "####" is made of \W, too
)
# "(B)", "option B", "B is right", "B." at the beginning of a line
_MARKED = r"(?:\((?=.\))|\b[Oo]ption\s+(?=.\b)|\b(?=.\s+is\s+(?:the\s+)?(?:correct|right)\b)|^[^\w\n]*(?=.[.):]))"


def find_choice(response: str, choices: Sequence[str]) -> Answer | None:
    """The last option that is stated as the answer ("Answer: B", "it is (B)"); else the only one that fills a line
    ("B", "B. Paris"); else the only one that is marked as one ("(B)", "option B", "B is right"); else the only one
    whose text occurs. None if several do, or if none does. "Answer: B?" states none. The key is the letter."""
    options = {letter: text.strip(" .") for letter, text in zip(LETTERS, choices, strict=False)}
    stated, fills_line, marked = _patterns(options)
    if found := list(stated.finditer(response)):
        return _answer(found[-1])
    for pattern in (fills_line, marked):
        if found := list(pattern.finditer(response)):
            return _answer(found[0]) if len({match[1] for match in found}) == 1 else None
    return _quoted(response, options)


def _patterns(options: Mapping[str, str]) -> list[re.Pattern[str]]:
    """Patterns whose group 1 is an option's letter: stated as the answer, filling a line, marked as an option."""
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


def _answer(match: re.Match[str]) -> Answer:
    return Answer(match.start(1), match.end(1), match[1])


def _quoted(response: str, options: Mapping[str, str]) -> Answer | None:
    """The only option whose text occurs, other than in the text of another ("acid" in "nucleic acid")."""
    found = [
        Answer(match.start(), match.end(), letter)
        for letter, text in options.items()
        if text and (match := re.search(rf"(?<!\w){re.escape(text)}(?!\w)", response, re.IGNORECASE))
    ]
    longest = [a for a in found if not any(a != b and b.start <= a.start and a.end <= b.end for b in found)]
    return longest[0] if len(longest) == 1 else None
