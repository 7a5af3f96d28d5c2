r"""Where the answer of a response is, and whether it is right.

`find` never looks at the right answer, so that what is built on it (scores of the answer alone, majority votes) is
free of labels; `accepts` does. Neither looks at the thoughts of a reasoning model.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from cme.errors import CMEError
from cme.tasks.choices import LETTERS, find_choice
from cme.tasks.numbers import find_number, read_number
from cme.tasks.questions import Question, Split
from cme.text.thoughts import hide_thoughts


@dataclass(frozen=True)
class Answer:
    """The part [start, end) of a response, in characters. Answers that say the same have the same `key`."""

    start: int
    end: int
    key: str


@dataclass(frozen=True)
class Matcher:
    """Attributes:
    locate: the answer in a response without thoughts; None if there is none.
    judge: whether such a response, with the answer located in it, is right.
    objection: why no response to a question could be judged; None if any can.
    """

    locate: Callable[[str, Question], Answer | None]
    judge: Callable[[str, Answer | None, Question], bool]
    objection: Callable[[Question], str | None] = lambda question: None

    def find(self, response: str, question: Question) -> Answer | None:
        """The answer in a response; None if there is none, or none yet, as thoughts are still open."""
        shown = hide_thoughts(response)
        return None if shown is None else self.locate(shown, question)

    def accepts(self, response: str, answer: Answer | None, question: Question) -> bool:
        """Whether a response, with the answer found in it, is right."""
        shown = hide_thoughts(response)
        return shown is not None and self.judge(shown, answer, question)

    def is_correct(self, response: str, question: Question) -> bool:
        return self.accepts(response, self.find(response, question), question)


@dataclass(frozen=True)
class Task:
    """Attributes:
    about: one line for a person, with source and licence.
    load: the questions of a split, in an order that never changes. Raises DatasetError if they can't be had.
    matcher: tells right from wrong.
    package: whose version is worth noting; None if there is none.
    """

    name: str
    about: str
    load: Callable[[Split], list[Question]]
    matcher: Matcher
    package: str | None = None


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


def number(response: str, question: Question) -> Answer | None:
    """The number that a response gives as its answer."""
    found = find_number(response)
    return None if found is None else Answer(found.start, found.end, str(found.value))


def option(response: str, question: Question) -> Answer | None:
    """The option that a response chooses, by its letter or its text."""
    if problem := _no_options(question):
        raise CMEError(f"the question {question.id!r} {problem}")
    found = find_choice(response, question.choices)
    return None if found is None else Answer(found.start, found.end, found.letter)


def _no_options(question: Question) -> str | None:
    if 0 < len(question.choices) <= len(LETTERS):
        return None
    return f"has {len(question.choices) or 'no'} options: the matcher 'choice' needs 1 to {len(LETTERS)}"


def _no_number(question: Question) -> str | None:
    gold = next((gold for gold in question.answers if read_number(gold) is None), None)
    return None if gold is None else f"has the answer {gold!r}, which is no number"


def _no_words(question: Question) -> str | None:
    gold = next((gold for gold in question.answers if not normalise(gold)), None)
    return None if gold is None else f"has the answer {gold!r}, in which there is no word"


def _is_a_key(response: str, answer: Answer | None, question: Question) -> bool:
    return answer is not None and answer.key in {normalise(gold) or gold.strip() for gold in question.answers}


def _contains(response: str, answer: Answer | None, question: Question) -> bool:
    text = f" {normalise(response)} "
    return any(f" {normalise(gold)} " in text for gold in question.answers if normalise(gold))


def _equals(response: str, answer: Answer | None, question: Question) -> bool:
    found = None if answer is None else read_number(response[answer.start : answer.end])
    golds = map(read_number, question.answers)
    return found is not None and any(gold is not None and gold.agrees(found) for gold in golds)


def _is_right_option(response: str, answer: Answer | None, question: Question) -> bool:
    return answer is not None and question.choices[LETTERS.index(answer.key)] in question.answers


EXACT = Matcher(whole, _is_a_key)
CONTAINS = Matcher(added, _contains, _no_words)
NUMERIC = Matcher(number, _equals, _no_number)
CHOICE = Matcher(option, _is_right_option, _no_options)
