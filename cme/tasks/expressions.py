r"""Answers that are mathematical expressions in LaTeX, which math-verify reads and compares."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from cme.tasks.matchers import Matcher, extract_number, extract_whole, normalise, objection_to
from cme.tasks.numbers import end_of_braces
from cme.tasks.questions import Answer, Question, require

_BOXED = r"\boxed{"
_LATEX_WORDS = re.compile(r"\\(?:text|mbox|textbf|mathrm)\s*\{[^{}]*\}|\\[A-Za-z]+")
_SENTENCE = re.compile(r"(?:[A-Za-z]{2,}[^A-Za-z]+){3}[A-Za-z]{2,}")

# SymPy would write such numbers out: towers of powers, 2^{12!}, 10^{1000000}, 1000000!, binomials of large numbers
_ENORMOUS = re.compile(
    r"\d\s*(?:\^|\*\*)[\s({]*[-\d]\d*\s*(?:\^|\*\*|!)|(?:\^|\*\*)[\s({-]*\d{6}|\d{6}[\s)}]*!|\\[dt]?binom\s*\{\d{5}"
)
_LONGEST, _DEEPEST = 500, 50  # characters and opening brackets: math-verify takes seconds for more


def _extract(response: str, question: Question) -> Answer | None:
    r"""The content of the last \boxed{}; else the number that is the answer; else the whole response."""
    span = _last_box(response)
    if span is None:
        return extract_number(response, question) or extract_whole(response, question)
    expression = response[slice(*span)]
    try:
        key = str(_parse(expression)[0])
    except (IndexError, ValueError):  # nothing was read; an integer that Python doesn't write out
        key = normalise(expression) or expression.strip()
    return Answer(*span, key)


def _last_box(text: str) -> tuple[int, int] | None:
    start = text.rfind(_BOXED) + len(_BOXED)
    return (start, end_of_braces(text, start)) if _BOXED in text else None


def _parse_gold(gold: str) -> list[Any]:
    r"""A right answer is an expression, or a solution that ends in one in \boxed{}; a sentence is none, though
    math-verify takes its letters for symbols."""
    span = _last_box(gold)
    expression = gold if span is None else gold[slice(*span)]
    return [] if _SENTENCE.search(_LATEX_WORDS.sub("", expression[:_LONGEST])) else _parse(expression)


def _parse(expression: str) -> list[Any]:
    """An object of SymPy and a text, from math-verify; empty if it reads nothing, or would take seconds."""
    depth = sum(map(expression.count, "({["))
    too_large = len(expression) > _LONGEST or depth > _DEEPEST or _ENORMOUS.search(expression)
    return [] if too_large else _parse_cached(expression)


@lru_cache(maxsize=4096)
def _parse_cached(expression: str) -> list[Any]:
    found: list[Any] = _math_verify().parse(f"{_BOXED}{expression}}}")
    return found


def _is_equal(response: str, answer: Answer | None, question: Question) -> bool:
    found = [] if answer is None else _parse(response[answer.start : answer.end])
    return any(_math_verify().verify(_parse_gold(gold), found) for gold in question.answers)


def _math_verify() -> Any:
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it would print whole responses
    return require("math_verify", "comparing expressions")


MATH = Matcher(_extract, _is_equal, objection_to(_parse_gold, "which is no expression"))
