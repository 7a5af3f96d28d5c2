"""The demo's questions: capitals of the world, split once into training and held-out countries."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

HELD_OUT = 80  # countries

# By ISO 3166 code: no capital that everybody accepts, none at all, or the data names a place that isn't one
_LEFT_OUT = {
    "AN": "dissolved in 2010",
    "BQ": "three islands, three towns",
    "CS": "dissolved in 2006",
    "EH": "disputed",
    "HK": "a city; the data names a former one",
    "IL": "disputed",
    "IO": "no capital",
    "PS": "disputed",
    "TK": "no capital",
}

# By ISO 3166 code: names that are out of date, or not what a sentence would say
_NAMES = {
    "CZ": "the Czech Republic",
    "MF": "Saint Martin",
    "MK": "North Macedonia",
    "SX": "Sint Maarten",
    "SZ": "Eswatini",
    "VG": "the British Virgin Islands",
    "VI": "the United States Virgin Islands",
}
_ARTICLE = re.compile(
    r"^(United|Republic|Democratic|Dominican|Central African|Federated|Isle|French Southern)|Islands$"
    r"|^(Comoros|Maldives|Netherlands|Philippines|Seychelles)$"
)

# By ISO 3166 code: the capital moved, was renamed, or is another one
_CAPITALS = {"BI": "Gitega", "KZ": "Astana", "SZ": "Mbabane"}

# Further right answers: other official seats, former names until a model may be expected to know, other spellings
_ALSO = {
    "Ashgabat": ("Ashkhabad",),
    "Astana": ("Nur-Sultan",),
    "Bern": ("Berne",),
    "Chișinău": ("Kishinev",),
    "City of San Marino": ("San Marino",),
    "Colombo": ("Sri Jayawardenepura Kotte", "Kotte"),
    "Flying Fish Cove": ("The Settlement",),
    "George Town": ("Georgetown",),
    "Gitega": ("Bujumbura",),
    "Hagåtña": ("Agana",),
    "Kyiv": ("Kiev",),
    "Mbabane": ("Lobamba",),
    "Naypyidaw": ("Nay Pyi Taw", "Naypyitaw"),
    "New Delhi": ("Delhi",),
    "Nuuk": ("Godthab",),
    "Plymouth": ("Brades",),
    "Pretoria": ("Cape Town", "Bloemfontein"),
    "South Tarawa": ("Tarawa",),
    "Sucre": ("La Paz",),
    "Ulaanbaatar": ("Ulan Bator",),
    "Washington D.C.": ("Washington",),
}


def load_capitals() -> tuple[Dataset, Dataset]:
    """Return the (training, held-out) questions; which country is in which never changes.

    A row has `prompt` (a conversation of one user turn), `question` (the same without "Answer briefly. "),
    `country` and `answer`. Questions that contain their own answer (Monaco, Guinea-Bissau) are left out: a copy of
    the question would count as right.
    """
    from countryinfo import CountryInfo
    from datasets import Dataset

    rows: dict[str, dict[str, object]] = {}
    for entry in CountryInfo.all().values():
        code, capital = entry.get("ISO", {}).get("alpha2"), entry.get("capital")
        if not code or code in _LEFT_OUT or not capital or not isinstance(capital, str):
            continue
        name = re.sub("^The ", "the ", entry["name"])
        country = _NAMES.get(code) or (f"the {name}" if _ARTICLE.search(name) else name)
        answer = _CAPITALS.get(code, capital)
        question = f"What is the capital of {country}?"
        if not is_correct(question, answer):
            prompt = [{"role": "user", "content": f"Answer briefly. {question}"}]
            # A code's first entry is the sovereign country's; a second is a former name or a part of it
            rows.setdefault(code, {"prompt": prompt, "question": question, "country": country, "answer": answer})
    # The order of hashes is as good as a shuffle and stays when an entry comes or goes
    ordered = [rows[code] for code in sorted(rows, key=lambda code: hashlib.sha256(code.encode()).digest())]
    return Dataset.from_list(ordered[HELD_OUT:]), Dataset.from_list(ordered[:HELD_OUT])


def is_correct(response: str, answer: str) -> bool:
    """Whether `answer`, or another spelling or seat of that capital, occurs in `response` as whole words.

    Case, accents and punctuation don't count, and "St." is "Saint".
    """
    return any(
        f" {_normalise(right, mark)} " in f" {_normalise(response, mark)} "
        for right in (answer, *_ALSO.get(answer, ()))
        for mark in ("", " ")  # an apostrophe may join (Sanaa, Ndjamena) or part (Paris's)
    )


def _normalise(text: str, apostrophe: str) -> str:
    text = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    text = re.sub("['’‘ʼ`]", apostrophe, text)
    words = re.sub(r"[\W_]+", " ", text).split()
    return " ".join("saint" if word == "st" else word for word in words)
