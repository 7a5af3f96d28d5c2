r"""Answers that are mathematical expressions in LaTeX, which math-verify reads and compares."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from cme.tasks.matchers import Answer, Matcher, normalise, number, whole
from cme.tasks.numbers import end_of_braces
from cme.tasks.questions import Question, require

_BOXED = r"\boxed{"
_NO_WORDS = re.compile(r"\\(?:text|mbox|textbf|mathrm)\s*\{[^{}]*\}|\\[A-Za-z]+")
_ENORMOUS = re.compile(  # SymPy would write the number out: a tower of powers, 2^{12!}, 10^{1000000}
    r"\d\s*(?:\^|\*\*)[\s({]*[-\d]\d*\s*(?:\^|\*\*|!)|(?:\^|\*\*)[\s({-]*\d{6}|\d{6}[\s)}]*!|\\[dt]?binom\s*\{\d{5}"
)
_LONGEST, _DEEPEST = 500, 50  # characters and opening brackets: math-verify takes seconds for more
_SENTENCE = re.compile(r"(?:[A-Za-z]{2,}[^A-Za-z]+){3}[A-Za-z]{2,}")


def _expression(response: str, question: Question) -> Answer | None:
    r"""What is in the last \boxed{}; else the number that is the answer; else the whole response."""
    span = _in_box(response)
    if span is None:
        return number(response, question) or whole(response, question)
    return Answer(*span, _key(response[slice(*span)]))


def _key(expression: str) -> str:
    try:
        return str(_read(expression)[0])
    except (IndexError, ValueError):  # nothing was read; an integer that Python doesn't write out
        return normalise(expression) or expression.strip()


def _in_box(text: str) -> tuple[int, int] | None:
    start = text.rfind(_BOXED) + len(_BOXED)
    return (start, end_of_braces(text, start)) if _BOXED in text else None


def _read_gold(gold: str) -> list[Any]:
    r"""A right answer is an expression, or a solution that ends in one in \boxed{}; a sentence is none, though
    math-verify takes its letters for symbols."""
    span = _in_box(gold)
    expression = gold if span is None else gold[slice(*span)]
    if len(expression) > _LONGEST or _SENTENCE.search(_NO_WORDS.sub("", expression)):
        return []
    return _read(expression)


def _read(expression: str) -> list[Any]:
    """What math-verify makes of an expression: nothing, or an object of SymPy and a text. Nothing, too, where it
    would take seconds."""
    depth = sum(map(expression.count, "({["))
    if len(expression) > _LONGEST or depth > _DEEPEST or _ENORMOUS.search(expression):
        return []
    return _parse(expression)


@lru_cache(maxsize=4096)
def _parse(expression: str) -> list[Any]:
    found: list[Any] = _math_verify().parse(f"{_BOXED}{expression}}}")
    return found


def _is_equal(response: str, answer: Answer | None, question: Question) -> bool:
    found = [] if answer is None else _read(response[answer.start : answer.end])
    return any(_math_verify().verify(_read_gold(gold), found) for gold in question.answers)


def _no_expression(question: Question) -> str | None:
    gold = next((gold for gold in question.answers if not _read_gold(gold)), None)
    return None if gold is None else f"has the answer {gold!r}, which is no expression"


def _math_verify() -> Any:
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it would print whole responses
    return require("math_verify", "comparing expressions")


MATH = Matcher(_expression, _is_equal, _no_expression)
