"""The demo's questions: capitals of the world, split into training and held-out countries."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from importlib.resources import files
from typing import Any

from cme.tasks.matchers import Matcher, Task, extract_new_words, normalise
from cme.tasks.questions import Answer, Question, Split

HELD_OUT = 80  # countries

_ARTICLE = re.compile(
    r"^(United|Republic|Democratic|Dominican|Central African|Federated|Isle|French Southern)|Islands$"
    r"|^(Comoros|Maldives|Netherlands|Philippines|Seychelles)$"
)


def load_capitals(split: Split) -> list[Question]:
    """The questions of a split; the split of a country never changes.

    Questions that contain their own answer (Monaco, Guinea-Bissau) are left out: a copy of the question would be
    right.
    """
    from countryinfo import CountryInfo

    mended = _corrections()
    questions: dict[str, Question] = {}  # by ISO 3166 code
    for entry in CountryInfo.all().values():
        code, capital = entry.get("ISO", {}).get("alpha2"), entry.get("capital")
        if not code or code in mended["left_out"] or not capital or not isinstance(capital, str):
            continue
        name = re.sub("^The ", "the ", entry["name"])
        country = mended["names"].get(code) or (f"the {name}" if _ARTICLE.search(name) else name)
        answer = mended["capitals"].get(code, capital)
        text = f"What is the capital of {country}?"
        if not is_correct(text, answer):
            # A code's first entry is the sovereign country's; a second is a former name or a part of it
            questions.setdefault(code, Question(country, text, (answer,), "Answer briefly."))
    # The order of hashes is as good as a shuffle and stays when an entry comes or goes
    ordered = [questions[code] for code in sorted(questions, key=lambda c: hashlib.sha256(c.encode()).digest())]
    return ordered[HELD_OUT:] if split == "train" else ordered[:HELD_OUT]


@cache
def _corrections() -> dict[str, Any]:
    import tomllib  # 8 ms, which no help text needs

    return tomllib.loads(files("cme.tasks").joinpath("capitals.toml").read_text(encoding="utf-8"))


def is_correct(response: str, answer: str) -> bool:
    """True if `answer`, or another spelling or seat of that capital, occurs in `response` as whole words.

    Case, accents and punctuation don't count, and "St." is "Saint".
    """
    return any(
        f" {_words(right, mark)} " in f" {_words(response, mark)} "
        for right in (answer, *_corrections()["also"].get(answer, ()))
        for mark in ("", " ")  # an apostrophe may join (Sanaa, Ndjamena) or part (Paris's)
    )


def _words(text: str, apostrophe: str) -> str:
    return " ".join("saint" if word == "st" else word for word in normalise(text, apostrophe).split())


def _judge(response: str, answer: Answer | None, question: Question) -> bool:
    return is_correct(response, question.answers[0])


CAPITALS = Task(
    "capitals",
    "capitals of the world (countryinfo, MIT)",
    load_capitals,
    Matcher(extract_new_words, _judge),
    "countryinfo",
)
