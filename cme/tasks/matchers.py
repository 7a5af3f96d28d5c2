r"""Where the answer of a response is, and whether it is right.

`find` never looks at the right answer, so that what is built on it (scores of the answer alone, majority votes) is
free of labels; `accepts` does.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from cme.errors import CMEError
from cme.tasks.questions import LETTERS, Question


@dataclass(frozen=True)
class Answer:
    """The part [start, end) of a response, in characters. Answers that say the same have the same `key`."""

    start: int
    end: int
    key: str


@dataclass(frozen=True)
class Matcher:
    """Attributes:
    find: the answer in a response; None if there is none.
    accepts: whether a response, with the answer found in it, is right.
    """

    find: Callable[[str, Question], Answer | None]
    accepts: Callable[[str, Answer | None, Question], bool]

    def is_correct(self, response: str, question: Question) -> bool:
        return self.accepts(response, self.find(response, question), question)


def normalise(text: str) -> str:
    """Words in lower case, without accents and punctuation."""
    text = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    return " ".join(re.sub(r"[\W_]+", " ", re.sub("['’‘ʼ`]", "", text)).split())


def whole(response: str, question: Question) -> Answer | None:
    """The response without the white space around it."""
    text = response.strip()
    start = response.find(text)
    return Answer(start, start + len(text), normalise(text) or text) if text else None


# Words that frame an answer
_FRAME = re.compile(
    "a|also|an|and|answer|are|as|at|be|by|called|city|country|for|from|has|have|in|is|it|its|known|of|on|or|so|state"
    "|that|the|their|there|these|they|this|to|was|were|which|with",
    re.IGNORECASE,
)
_INSIDE = frozenset(("and", "of", "the"))  # which may be a part of an answer: Port of Spain
_CLAUSE_END = re.compile(r"[,;:!?]\s|\n|(?<=\w{3})\.\s")
_WORD = re.compile(r"\w[\w'’.-]*\w|\w")


def added(response: str, question: Question) -> Answer | None:
    """What the response adds to the question: the first run of new words.

    "The capital of Peru is Lima, a city" adds "Lima" to "What is the capital of Peru?". A heuristic: an answer
    after other new words is not found.
    """
    known = set(normalise(question.full_text).split())

    def is_new(word: str) -> bool:
        return not _FRAME.fullmatch(word) and not set(normalise(word).split()) <= known

    start = 0
    for end in [*(match.start() for match in _CLAUSE_END.finditer(response)), len(response)]:
        words = list(_WORD.finditer(response, start, end))
        first = next((i for i, word in enumerate(words) if is_new(word[0])), None)
        if first is not None:
            last = first
            for i in range(first + 1, len(words)):
                if is_new(words[i][0]):
                    last = i
                elif words[i][0] not in _INSIDE:
                    break
            span = words[first].start(), words[last].end()
            return Answer(*span, normalise(response[slice(*span)]))
        start = end
    return whole(response, question)


_NUMBER = r"(?<![\w.)])[-−]?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?|\d[\d,]*(?:\.\d+)?(?:/\d+)?"
_STATED = re.compile(rf"(?:####|\\boxed\{{|[Aa]nswer(?: is|:))[\s$*(]*({_NUMBER})")


def number(response: str, question: Question) -> Answer | None:
    r"""The number after "####", "answer is", "answer:" or \boxed{, the last of them; else the last number."""
    found = [(m.start(1), m.end(1)) for m in _STATED.finditer(response)]
    found = found or [m.span() for m in re.finditer(_NUMBER, response)]
    if not found:
        return None
    start, end = found[-1]
    return Answer(start, end, str(value_of(response[start:end])))


def value_of(text: str) -> Fraction | None:
    """The value of "1,234.5", "-3/4" or "$7"; None if the text is no number."""
    try:
        return Fraction(text.strip().replace("−", "-").replace(",", "").replace("$", ""))
    except (ValueError, ZeroDivisionError):
        return None


def option(response: str, question: Question) -> Answer | None:
    """The option that is chosen, by its letter ("B", "(B)", "B. Paris", "the answer is B") or by its text."""
    letters = LETTERS[: len(question.choices)]
    if not letters:
        raise CMEError(f"the matcher 'choice' needs choices, and the question {question.id!r} has none")
    stated = re.search(rf"[Aa]nswer(?: is|:)\s*\W*([{letters}])\b", response)
    alone = re.match(rf"\W*([{letters}])(?:[.):\n]|\W*$)", response)
    match = stated or alone or re.search(rf"\(([{letters}])\)", response)
    if match:
        return Answer(match.start(1), match.end(1), match[1])
    found = [
        Answer(match.start(), match.end(), letter)
        for letter, choice in zip(letters, question.choices, strict=True)
        if (match := re.search(rf"(?<!\w){re.escape(choice.strip(' .'))}(?!\w)", response, re.IGNORECASE))
    ]
    # An option may be a part of another ("acid", "nucleic acid"), and a response may name several
    longest = [a for a in found if not any(a != b and b.start <= a.start and a.end <= b.end for b in found)]
    return longest[0] if len(longest) == 1 else None


def _is_a_key(response: str, answer: Answer | None, question: Question) -> bool:
    return answer is not None and answer.key in {normalise(gold) or gold.strip() for gold in question.answers}


def _contains(response: str, answer: Answer | None, question: Question) -> bool:
    text = f" {normalise(response)} "
    return any(f" {normalise(gold)} " in text for gold in question.answers if normalise(gold))


def _equals(response: str, answer: Answer | None, question: Question) -> bool:
    if answer is None:
        return False
    value = value_of(response[answer.start : answer.end])
    return value is not None and value in {value_of(gold) for gold in question.answers}


def _is_right_option(response: str, answer: Answer | None, question: Question) -> bool:
    return answer is not None and question.choices[LETTERS.index(answer.key)] in question.answers


EXACT = Matcher(whole, _is_a_key)
CONTAINS = Matcher(added, _contains)
NUMERIC = Matcher(number, _equals)
CHOICE = Matcher(option, _is_right_option)

MATCHERS = {"exact": EXACT, "contains": CONTAINS, "numeric": NUMERIC, "choice": CHOICE}
"""For files with gold answers."""


def find_matcher(name: str) -> Matcher:
    """Raises CMEError, with the known names, if there is none called `name`."""
    if name not in MATCHERS:
        raise CMEError(f"there is no matcher {name!r}: give {', '.join(MATCHERS)}")
    return MATCHERS[name]
