"""Questions with known answers, and their split; answers in responses."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal, get_args

from cme.errors import DatasetError
from cme.text.messages import Messages, text_of

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = get_args(Split)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""The names of the options of a multiple-choice question."""

HELD_OUT_SHARE = 1 / 3
"""The share of held-out questions where the source of a task has no split."""


@dataclass(frozen=True)
class Answer:
    """The part [start, end) of a response, in characters. Answers that say the same have the same `key`."""

    start: int
    end: int
    key: str


@dataclass(frozen=True)
class Question:
    """A question with known answers.

    Attributes:
        id: unique in its task.
        text: the question as a verifier sees it.
        answers: every accepted answer, the usual one first.
        instruction: comes before the question for a model that is to answer it.
        choices: the options of a multiple-choice question.
        metadata: whatever else the task's matcher needs.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    instruction: str = ""
    choices: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def prompt(self) -> Messages:
        """A conversation of one user turn: the instruction, the question, and its options if there are any."""
        parts = [" ".join(filter(None, (self.instruction, self.text)))]
        parts += [f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        return [{"role": "user", "content": "\n".join(parts)}]

    @property
    def full_text(self) -> str:
        """The question as a verifier of free responses sees it: with the options, to which they may refer."""
        return text_of(self.prompt) if self.choices else self.text


def split_by_id(questions: Iterable[Question], split: Split) -> list[Question]:
    """The questions of a split, in the order of the SHA-256 of their ids, which is as good as a shuffle.

    Split and order depend on a question's own id alone: both stay when other questions come or go.
    """
    hashes = {question: hashlib.sha256(question.id.encode()).digest() for question in questions}
    limit = int(HELD_OUT_SHARE * 2**32)
    kept = [q for q, digest in hashes.items() if (int.from_bytes(digest[:4]) < limit) == (split == "held_out")]
    return sorted(kept, key=hashes.__getitem__)


def require(module: str, purpose: str) -> ModuleType:
    """Import an optional package. Raises DatasetError, which says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise DatasetError(f"{purpose} needs the package {package} ({error}): pip install 'cme[eval]'") from error
