r"""Numbers in texts: one grammar for right answers and for responses.

A number is 1,234.5, 10 000, .5, $7, −3, minus 3, 3.2e5, 3.2 \times 10^5, 3/4, 1 1/2, 1½, \frac{3}{4} or 5 million.
A piece of something else is none: of a malformed number (1,2 or 1.234.567), one in another notation (1.5M, 10⁶),
an expression (6*7, 2^{10}, \sqrt{2}, 5\pi), an inequality (x > 3, at least 3), a denial (not 3), a question (3?),
a range (10-15), a ratio (1 in 5), a time (12:30), a quantity in two units (5 hours 30 minutes).
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

_SEPARATORS = (r",\\![ ]?", ",", r"\{,\}", r"\\,", "[ ]", "\u00a0", "\u2009", "\u202f", "'", "’", "_")
_GROUPED = "|".join(rf"\d{{1,3}}(?:{separator}\d{{3}})+(?!\d)" for separator in _SEPARATORS)
_REAL = rf"(?:(?:{_GROUPED}|\d+)(?:\.\d+)?|(?<![\d.])\.\d+)"
_SIGN = "[-−–+]"
_CURRENCY = r"(?:US)?\\?[$€£¥₹]"
_VULGAR = "[¼-¾⅐-⅞]"
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NUMBER = re.compile(
    rf"""
    (?P<sign>(?<![\w)\]}}]){_SIGN}|\b(?i:minus|negative)[ ])? (?:{_CURRENCY}(?P<inner>{_SIGN})?)?
    (?P<digits>(?<![A-Za-z\d_\\])
      (?:(?P<whole>\d+)(?:[ ](?=\d+/\d)|[ ]?(?=\\[dtc]?frac|{_VULGAR})))?
      (?:
        \\[dtc]?frac \s* (?:\{{(?P<top>{_SIGN}?{_REAL})\}}|(?P<top_digit>\d))
                     \s* (?:\{{(?P<bottom>{_REAL})\}}|(?P<bottom_digit>\d))
      | (?P<vulgar>{_VULGAR})
      | (?P<real>{_REAL})
        (?: [ ]?[/⁄][ ]?(?P<divisor>{_REAL})
          | [eE](?P<exponent>{_SIGN}?\d+)(?!\w)
          | [ ]?(?:[x×*·⋅]|\\times|\\cdot)[ ]?10[ ]?(?:\^|\*\*)[ ]?\{{?(?P<power>{_SIGN}?\d+)\}}?
        )?
      )
    )
    (?:[ ](?P<scale>{"|".join(_SCALES)})s?\b)? (?:[ ]?(?P<percent>\\?%|percent\b))?
    """,
    re.VERBOSE,
)

# Where a piece of something else begins and ends: what is before it, and after it. "|" is where the number is cut
_OPERATOR = r"(?:[-−–+*/×·÷⋅x]|[ ]+[-−–+*/×·÷⋅x][ ]+|[ ]?\\(?:times|cdot|div|pm)[ ]?)"
_UNIT = (
    r"(?:hours?|hrs?|h|minutes?|min|days?|weeks?|months?|years?|feet|foot|ft|yards?|pounds?|lbs?|dollars?|kg|km|m)"
)
_BOUND = r"(?:\b(?i:not|never|than|at[ ](?:least|most)|up[ ]to|over|under|above|below|exceeds)|n['’]t)"
_WORD_OPERATOR = r"[ ](?:plus|minus|times|over|divided[ ]by|choose|in|:)[ ]"
_PARTS = "hal(?:f|ves)|thirds?|fourths?|fifths?|tenths?|hundredths?|thousandths?|millionths?"
_BEFORE_PIECE = re.compile(
    rf"""(?:
      \d(?:[.,:]|\{{,\}}|\.\()                                                                # 12:|30  0.(|3)
    | [\d)\]}}](?:{_OPERATOR}|\*\*)[({{]*(?:{_CURRENCY})?                                     # 6*|7
    | (?:[\^√±≠≤≥]|\w[ ]?<|\w[ ]+>|(?<![\w</])\w>)[ ]?[({{]?                                # x > |3, not <b>3
    | \\(?:sqrt|pm|neq?|[lg]eq?|[dtc]?frac|binom|log|ln|sin|cos|tan|overline|bar|dot)[ ]?[({{]?
    | [_}}]\{{                                                                               # \frac{{x}}{{|2}}
    | \d[ ]?{_UNIT}[ ](?:and[ ])?                                                            # 5 ft |7 in
    | \d{_WORD_OPERATOR} | \b[a-z][ ](?:plus|minus|times)[ ]                                 # 1 in |5
    | {_BOUND}(?:[ ]be|[ ]equal(?:[ ]to)?)?[ ][*_("]*(?:{_SIGN}|minus[ ]|negative[ ])?(?:{_CURRENCY})?
    )$""",
    re.VERBOSE,
)
_AFTER_PIECE = re.compile(
    rf"""
      (?:[.,:]|\{{,\}}|[A-Za-z]+)\d                                                           # 12|:30  0|x1F
    | {_OPERATOR}(?:{_CURRENCY})?[({{]*[\d\\]                                                 # 6|*7
    | [ ]?(?:[√π]|\\(?:sqrt|pi|[dtc]?frac|binom)) | _ | [ ]?[xyz]\b | \^(?!\{{?\\circ) | \*\*\d
    | [ ]?{_UNIT}[ ](?:and[ ])?\d                                                            # 5| ft 7 in
    | {_WORD_OPERATOR}\d{{1,3}}\b | [ ](?:squared|cubed|factorial|or[ ](?:more|less|fewer|above))\b
    | [ ](?:degrees?[ ])?below\b | [ ](?:{"|".join(_SCALES)})s?\b                             # 2 hundred| thousand
    | [ -](?:and[ ]an?[ ]|and[ ]one[ ])?(?:{_PARTS})\b | [ ]and[ ]an?[ ]quarter\b             # 2| and a half
    | [ijknqruvwKMB]\b | [ ]?(?:[kMB]|[bm]n)\b                                               # 3|i  1.5|M
    | [ ]?[¹²³⁰-₟¼-¾⅐-⅟‰‱±≤≥≠] | [\u0300-\u036f] | \.\(\d | [.,]?\\(?:overline|bar|dot)      # 10|⁶  0|.(3)
    | \+ | [)\]}}*"”]*\? | !(?=[\w}}!*/^+-])                                                 # 10|+  42|?  5|!!
    """,
    re.VERBOSE,
)
_LISTED = re.compile(rf"\s*(?:[,;&]|and\b|or\b|to\b)\s*{_SIGN}?(?:{_CURRENCY})?\.?\d")

_STATED = re.compile(
    r"(?P<boxed>\\f?boxed\s*\{)|(?:####(?!#|\s*\d+[.)]\s+\w)|<answer>"
    r"|\banswer(?: (?:to|of|for) [^.:=\n]{1,60}?)?[*_\"]*"
    r"(?:\s+(?:is|was|(?:would|will|should|must) be)\b|\s*[:=]))[*_:\s]*",
    re.IGNORECASE,
)
_FILLER = re.compile(
    "a|about|all|approximately|around|be|equals?|exactly|is|just|nearly|now|number|of|only|roughly|simply|the|then"
    r"|therefore|thus|to|total|usd|eur|gbp|inr|rs|\\.*",
    re.IGNORECASE,
)
_WORD = re.compile(r"\\[A-Za-z]+|[^\W\d_]{2,}")
_MINUS = re.compile(r"[-−–]\W*\Z")  # apart from the number, it may be a dash
_TAIL = re.compile(r"(?:[^\d,;=!]|\\[,;!]){0,40}(?:(?<=[A-Za-z}])\^?\{?[23]\}?)?[^\d,;=!]{0,10}")  # a unit


@dataclass(frozen=True)
class Number:
    """The part [start, end) of a text, in characters, and its value without the percent sign."""

    start: int
    end: int
    value: Fraction
    is_percent: bool

    def agrees(self, other: Number) -> bool:
        """Equal numbers, whatever their percent signs, as graders leave these out; or equal values (1%, 0.01)."""
        shares = [number.value / 100 if number.is_percent else number.value for number in (self, other)]
        return self.value == other.value or shares[0] == shares[1]


def find_number(text: str) -> Number | None:
    r"""The number that a response gives as its answer: the last after "####", "answer is", "answer:", <answer> or
    in \boxed{}; else the last of all. None if that is a piece of something else, or of a list."""
    limit = len(text)
    for stated in reversed(list(_STATED.finditer(text))):
        end = _end_of_statement(text, stated, limit)
        found = list(_NUMBER.finditer(text, stated.end(), end))
        if stated["boxed"] or (found and _is_filler(text[stated.end() : found[0].start()])):
            return _first(text, found, stated.end())
        limit = stated.start()
    found = list(_NUMBER.finditer(text))
    return _number(found[-1]) if found and not _is_piece(text, found[-1]) else None


def read_number(text: str) -> Number | None:
    """The number in a right answer: alone, with a unit, or at the end of a solution after "####". None if the text
    is something else, or more than that."""
    start = text.rfind("####") + 4 if "####" in text else 0
    number = _first(text, list(_NUMBER.finditer(text, start)), start)
    return number if number and _TAIL.fullmatch(text, number.end) else None


def is_number(text: str) -> bool:
    """True if a text is a number and nothing else."""
    match = _NUMBER.fullmatch(text.strip())
    return match is not None and _number(match) is not None


def _end_of_statement(text: str, stated: re.Match[str], limit: int) -> int:
    """At the latest `limit`, where the next statement begins, so that each character is read once."""
    if stated["boxed"]:
        return end_of_braces(text, stated.end())
    end = re.compile(r"\.?\n|\.\s|</answer>").search(text, stated.end(), limit)
    return end.start() if end else limit


def end_of_braces(text: str, start: int) -> int:
    """The end of the group whose opening brace is before `start`; that of the text if it is left open."""
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    return len(text)


def _first(text: str, found: list[re.Match[str]], start: int) -> Number | None:
    """The first number of a statement that is no piece; None if words come before it, or it is one of several."""
    match = next((match for match in found if not _is_piece(text, match)), None)
    if match is None or _LISTED.match(text, match.end()):
        return None
    head = text[start : match.start()]
    return _number(match) if _is_filler(head) and not _MINUS.search(head[-20:]) else None


def _is_filler(text: str) -> bool:
    return all(map(_FILLER.fullmatch, _WORD.findall(text)))


def _is_piece(text: str, match: re.Match[str]) -> bool:
    start = match.start("digits")
    return bool(_BEFORE_PIECE.search(text[max(0, start - 30) : start]) or _AFTER_PIECE.match(text, match.end()))


def _number(match: re.Match[str]) -> Number | None:
    part = {name: _plain(value) for name, value in match.groupdict().items() if value}
    try:
        power = int(part.get("exponent") or part.get("power") or 0)
        value = Fraction(part.get("real") or part.get("top") or part.get("top_digit") or _vulgar(part["vulgar"]))
        value /= Fraction(part.get("divisor") or part.get("bottom") or part.get("bottom_digit") or 1)
        value += Fraction(part.get("whole", 0))
    except (ValueError, ZeroDivisionError):  # too many digits for an integer; 1/0
        return None
    if abs(power) > 400:  # slow, and more than a double holds
        return None
    sign = -1 if {part.get("sign"), part.get("inner")} & {"-"} else 1
    value *= sign * Fraction(10) ** power * _SCALES.get(part.get("scale", ""), 1)
    return Number(match.start(), match.end(), value, "percent" in part)


def _plain(text: str) -> str:
    return re.sub("[−–]|(?i:minus|negative)", "-", re.sub(r"\\[!,]|[\s,{}'’_]", "", text))


def _vulgar(fraction: str) -> Fraction:
    return Fraction(unicodedata.numeric(fraction)).limit_denominator(10)
