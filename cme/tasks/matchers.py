r"""Matchers: each extracts the answer from a response and judges it; and tasks, which have one.

Extracting an answer never looks at the right one, so that everything built on it (scores of the answer alone,
majority votes) is free of labels. Neither step looks at the thoughts of a reasoning model.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from cme.errors import CMEError
from cme.tasks.choices import find_choice
from cme.tasks.numbers import find_number, read_number
from cme.tasks.questions import LETTERS, Answer, Question, Split
from cme.text.messages import hide_thoughts


@dataclass(frozen=True)
class Matcher:
    """The rule by which a response to a question is right.

    Attributes:
        extract: the answer in a response without thoughts; None if there is none.
        judge: True if such a response, with the answer extracted from it, is right.
        objection: why no response to a question could be judged; None if any can.
    """

    extract: Callable[[str, Question], Answer | None]
    judge: Callable[[str, Answer | None, Question], bool]
    objection: Callable[[Question], str | None] = lambda question: None

    def find(self, response: str, question: Question) -> Answer | None:
        """The answer in a response; None if there is none, or none yet, as thoughts are still open."""
        shown = hide_thoughts(response)
        return None if shown is None else self.extract(shown, question)

    def accepts(self, response: str, answer: Answer | None, question: Question) -> bool:
        """True if a response, with the answer found in it, is right."""
        shown = hide_thoughts(response)
        return shown is not None and self.judge(shown, answer, question)

    def is_correct(self, response: str, question: Question) -> bool:
        return self.accepts(response, self.find(response, question), question)


@dataclass(frozen=True)
class Task:
    """Questions, and the rule by which responses to them are right.

    Attributes:
        about: one line for a person, with source and licence.
        load: the questions of a split, in an order that never changes. Raises DatasetError if they can't be had.
        package: whose version is worth noting; None if there is none.
    """

    name: str
    about: str
    load: Callable[[Split], list[Question]]
    matcher: Matcher
    package: str | None = None


def normalise(text: str, apostrophe: str = "") -> str:
    """Words in lower case, without accents and punctuation, with `apostrophe` in the place of each apostrophe."""
    text = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    return " ".join(re.sub(r"[\W_]+", " ", re.sub("['’‘ʼ`]", apostrophe, text)).split())


def extract_whole(response: str, question: Question) -> Answer | None:
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


def extract_new_words(response: str, question: Question) -> Answer | None:
    """The first run of words that the response adds to the question; the whole response if there is none.

    "The capital of Peru is Lima, a city" adds "Lima" to "What is the capital of Peru?". A heuristic: an answer
    after other new words is not found.
    """
    known = set(normalise(question.full_text).split())

    def is_new(word: str) -> bool:
        return not _FRAME.fullmatch(word) and not set(normalise(word).split()) <= known

    start = 0
    for end in [*(match.start() for match in _CLAUSE_END.finditer(response)), len(response)]:
        words = list(_WORD.finditer(response, start, end))
        new = [i for i, word in enumerate(words) if is_new(word[0])]
        if new:
            last = new[0]
            for i in new[1:]:
                if any(word[0] not in _INSIDE for word in words[last + 1 : i]):
                    break
                last = i
            span = words[new[0]].start(), words[last].end()
            return Answer(*span, normalise(response[slice(*span)]))
        start = end
    return extract_whole(response, question)


def extract_number(response: str, question: Question) -> Answer | None:
    """The number that a response gives as its answer."""
    found = find_number(response)
    return None if found is None else Answer(found.start, found.end, str(found.value))


def extract_option(response: str, question: Question) -> Answer | None:
    """The option that a response chooses, by its letter or its text."""
    if problem := _no_options(question):
        raise CMEError(f"the question {question.id!r} {problem}")
    return find_choice(response, question.choices)


def objection_to(is_readable: Callable[[str], object], why: str) -> Callable[[Question], str | None]:
    """The objection to questions with a right answer that is not readable."""

    def objection(question: Question) -> str | None:
        gold = next((gold for gold in question.answers if not is_readable(gold)), None)
        return None if gold is None else f"has the answer {gold!r}, {why}"

    return objection


def _no_options(question: Question) -> str | None:
    if 0 < len(question.choices) <= len(LETTERS):
        return None
    return f"has {len(question.choices) or 'no'} options: the matcher 'choice' needs 1 to {len(LETTERS)}"


def _is_whole(response: str, answer: Answer | None, question: Question) -> bool:
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


EXACT = Matcher(extract_whole, _is_whole)
CONTAINS = Matcher(extract_new_words, _contains, objection_to(normalise, "in which there is no word"))
NUMERIC = Matcher(extract_number, _equals, objection_to(read_number, "which is no number"))
CHOICE = Matcher(extract_option, _is_right_option, _no_options)
